// Format strings: parsing with errors that help, and the canonical spelling.
#include "formats/format.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <stdexcept>
#include <vector>

namespace bitfold {
namespace {

struct ScaleName {
  std::string_view token;
  Scale scale;
};
constexpr std::array kScaleNames = {ScaleName{"sfp16", Scale::F16}, ScaleName{"sbf16", Scale::BF16},
                                    ScaleName{"sfp32", Scale::F32}};

[[noreturn]] void fail(std::string_view text, const std::string& why) {
  throw std::invalid_argument("format '" + std::string(text) + "' " + why);
}

int edit_distance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row[b.size()];
}

std::string known_families(std::string_view text) {
  const FormatRow* nearest = nullptr;
  int best = 3;  // further away is no typo
  std::string all;
  for (const FormatRow& row : kFormats) {
    all += (all.empty() ? "" : ", ") + std::string(row.family);
    const int distance = edit_distance(text.substr(0, text.find('-')), row.family);
    if (distance < best) {
      best = distance;
      nearest = &row;
    }
  }
  return nearest ? "did you mean '" + std::string(nearest->family) + "'? Families: " + all : "families are " + all;
}

// The row whose family name starts the text; what follows it must be a '-' or the end.
std::optional<int> match_family(std::string_view text, std::string_view* rest) {
  for (size_t i = 0; i < kFormats.size(); ++i) {
    const std::string_view family = kFormats[i].family;
    if (text.starts_with(family) && (text.size() == family.size() || text[family.size()] == '-')) {
      *rest = text.substr(family.size());
      return static_cast<int>(i);
    }
  }
  constexpr std::string_view kShort = "fp8";
  if (text.starts_with(kShort) && (text.size() == kShort.size() || text[kShort.size()] == '-')) {
    *rest = text.substr(kShort.size());
    return kE4m3;
  }
  return std::nullopt;
}

// The columns in a token, which start at place `at` of it.
int64_t parse_group(std::string_view text, std::string_view token, size_t at, const FormatRow& row) {
  int64_t group = 0;
  const auto [end, error] = std::from_chars(token.data() + at, token.data() + token.size(), group);
  const std::string what = token[0] == 'b' ? "block" : "group";
  if (error != std::errc() || end != token.data() + token.size() || group < row.min_group || group > row.max_group) {
    std::string range = "of at least " + std::to_string(row.min_group) + " columns";
    if (row.max_group != kAnyGroup) {
      range = "of " + std::to_string(row.min_group) + " to " + std::to_string(row.max_group) + " columns";
    }
    fail(text, "has the " + what + " '" + std::string(token) + "'; " + std::string(row.family) + " takes a " + what +
                   " " + range);
  }
  return group;
}

// "b<rows>x<columns>": a scale for so many columns of so many rows.
void parse_tile(std::string_view text, std::string_view token, const FormatRow& row, Format* format) {
  constexpr int kMostShift = 20;
  const size_t by = token.find('x');
  int64_t rows = 0;
  const auto [end, error] = std::from_chars(token.data() + 1, token.data() + by, rows);
  const bool power = rows > 1 && rows <= int64_t{1} << kMostShift && (rows & (rows - 1)) == 0;
  if (error != std::errc() || end != token.data() + by || !power) {
    fail(text, "has the block '" + std::string(token) + "'; its rows must be a power of 2 from 2 to 2^" +
                   std::to_string(kMostShift));
  }
  format->group = parse_group(text, token, by + 1, row);
  for (format->row_shift = 0; rows >> format->row_shift != 1;) ++format->row_shift;
}

}  // namespace

Format parse_format(std::string_view text) {
  std::string_view rest;
  const std::optional<int> found = match_family(text, &rest);
  if (!found) fail(text, "is unknown: " + known_families(text));
  const FormatRow& row = kFormats[static_cast<size_t>(*found)];
  Format format{*found, row.group, Zero::None, row.scale};
  bool has_group = false, has_scale = false;
  while (!rest.empty()) {
    rest.remove_prefix(1);  // the '-'
    const std::string_view token = rest.substr(0, rest.find('-'));
    rest.remove_prefix(token.size());
    const auto once = [&](bool& seen, const char* what) {
      if (seen) fail(text, std::string("names its ") + what + " twice");
      seen = true;
    };
    const bool groups = row.min_group > 0;
    if (groups && row.group_letter == 'g' && (token == "tensor" || token == "channel")) {
      once(has_group, "granularity");
      format.group = token == "tensor" ? kPerTensor : kPerChannel;
    } else if (groups && token.size() > 1 && token[0] == row.group_letter) {
      once(has_group, "granularity");
      format.group = parse_group(text, token, 1, row);
    } else if (row.tall && token.size() > 1 && token[0] == 'b' && token.find('x') != std::string_view::npos) {
      once(has_group, "granularity");
      parse_tile(text, token, row, &format);
    } else if (row.asymmetric && token == "asym") {
      if (format.zero == Zero::Integer) fail(text, "says 'asym' twice");
      format.zero = Zero::Integer;
    } else if (row.nested && token == "dq") {
      once(has_scale, "scale dtype");
      format.scale = Scale::Nested;
    } else if (const auto* name = std::find_if(kScaleNames.begin(), kScaleNames.end(),
                                               [&](const ScaleName& item) { return item.token == token; });
               row.scale != Scale::None && name != kScaleNames.end()) {
      once(has_scale, "scale dtype");
      format.scale = name->scale;
    } else {
      std::string parts;
      const auto part = [&](bool allowed, const std::string& name) {
        if (allowed) parts += (parts.empty() ? "" : ", ") + name;
      };
      part(groups && row.group_letter == 'g', "tensor, channel");
      part(groups, std::string(1, row.group_letter) + "<columns>");
      part(row.tall, "b<rows>x<columns>");
      part(row.asymmetric, "asym");
      part(row.scale != Scale::None, "sfp16, sbf16, sfp32");
      part(row.nested, "dq");
      fail(text, "has the unknown part '" + std::string(token) + "'; " + std::string(row.family) + " takes " +
                     (parts.empty() ? "no parameters" : parts));
    }
  }
  return format;
}

std::string to_string(const Format& format) {
  const FormatRow& row = format.info();
  std::string text(row.family);
  if (row.grid == Grid::Cast || row.grid == Grid::Block) return text;
  if (format.group == kPerTensor) {
    text += "-tensor";
  } else if (format.group == kPerChannel) {
    text += "-channel";
  } else if (format.row_shift > 0) {
    text += "-b" + std::to_string(int64_t{1} << format.row_shift) + "x" + std::to_string(format.group);
  } else {
    text += std::string("-") + row.group_letter + std::to_string(format.group);
  }
  if (format.zero == Zero::Integer) text += "-asym";
  if (format.scale == Scale::Nested) {
    text += "-dq";
  } else if (format.scale != row.scale) {
    for (const ScaleName& name : kScaleNames) {
      if (name.scale == format.scale) text += "-" + std::string(name.token);
    }
  }
  return text;
}

Activations parse_activations(std::string_view text, const Format& format) {
  if (text == "float") return Activations::Float;
  if (text != "int8") {
    throw std::invalid_argument("activations is '" + std::string(text) + "'; it must be 'float' or 'int8'");
  }
  if (!format.is_block()) {
    throw std::invalid_argument("activations is 'int8', which linear has for GGUF's block formats alone; for " +
                                to_string(format) +
                                " it must be 'float' (linear_int8 multiplies int8 weights that have one scale a row)");
  }
  return Activations::Int8;
}

Layout parse_layout(std::string_view text) {
  if (text == "rows") return Layout::Rows;
  if (text == "flat") return Layout::Flat;
  throw std::invalid_argument("layout is '" + std::string(text) + "'; it must be 'rows' or 'flat'");
}

}  // namespace bitfold
