// Boxes of matrices, and products that read them: a small kernel against plain sums, and with one mistake at a time.
#include <random>

#include "box_kernel.hpp"
#include "emulator_tests.hpp"

namespace bitfold::cuda::test {
namespace {

template <int N, BoxMistake M = BoxMistake::None>
bool run() {
  std::mt19937 random(1);
  BoxData<N> data([&] { return random(); });
  launch({dim3(1), dim3(128), sizeof(BoxRoom<N>), "multiply_boxes", nullptr}, multiply_boxes<N, M>,
         BoxJob{tensor_map(data.matrix(data.start(data.a), 64)), tensor_map(data.matrix(data.start(data.b), N)),
                data.kByte, data.kLine, data.d.data()});
  return data.is_right();
}

CASE(boxes_come_turned_and_products_turn_them_back) {
  under_schedules(6, [] {
    expect(run<64>(), "64");
    expect(run<128>(), "128");
    expect(run<256>(), "256");
  });
}

template <BoxMistake M>
void expect_end(const std::string& part, emulator::Where where = emulator::Where::current()) {
  under_schedules(3, [&] { expect_error([] { run<64, M>(); }, {part}, where); });
}

CASE(a_box_beside_its_place_is_found) {
  expect_end<BoxMistake::Place>("copy_box goes to a multiple of 1024 of shared memory, got byte 512");
}
CASE(bytes_of_boxes_that_nobody_waits_for_are_found) { expect_end<BoxMistake::FewerBytes>("lacks 0 arrivals and "); }
CASE(bytes_that_no_box_brings_are_waited_for_for_ever) { expect_end<BoxMistake::MoreBytes>("lacks 0 arrivals and "); }
CASE(a_product_that_begins_within_eight_lines_is_found) {
  expect_end<BoxMistake::Start>("lines of boxes lie in shared memory from a multiple of 1024 on");
}
CASE(boxes_that_were_not_waited_for_are_found) {
  int wrong = 0;
  under_schedules(6, [&] {
    try {
      wrong += !run<64, BoxMistake::NoWait>();
    } catch (const std::runtime_error&) {
      ++wrong;
    }
  });
  expect(wrong >= 2, "in " + std::to_string(wrong) + " schedules");
}

CASE(a_matrix_that_no_map_can_have_is_refused) {
  alignas(16) static const uint8_t data[64]{};
  const auto refused = [](ByteMatrix matrix, const char* part) { expect_error([&] { tensor_map(matrix); }, {part}); };
  refused({data + 1, 2, 16, 16, 8}, "the data's address");
  refused({data, 2, 16, 24, 8}, "line_bytes is 24, and must be a multiple of 16");
  refused({data, 0, 16, 16, 8}, "lines is 0");
  refused({data, 2, 0, 16, 8}, "bytes is 0");
  refused({data, 2, 16, 16, 257}, "box_lines is 257, and must be 1 to 256");
}

}  // namespace
}  // namespace bitfold::cuda::test
