// The ops that cases are of: each runs on what its case's file gives it, and gives its outputs by the names of what is
// expected there.
#pragma once

#include <map>
#include <string>

#include "case_file.hpp"

namespace bitfold::cuda::test {

using Outputs = std::map<std::string, Memory>;

// product_cases.cpp
Outputs linear(const CaseFile& file);
Outputs linear_grad_x(const CaseFile& file);
// int8_cases.cpp
Outputs linear_int8(const CaseFile& file);
// format_cases.cpp
Outputs decode(const CaseFile& file);
Outputs encode(const CaseFile& file);
Outputs pack(const CaseFile& file);  // and unpack of what it packed
// gptq_cases.cpp
Outputs gptq_columns(const CaseFile& file);
Outputs search_steps(const CaseFile& file);
// kv_cases.cpp
Outputs kv_pack(const CaseFile& file);
Outputs kv_unpack(const CaseFile& file);
Outputs kv_attention(const CaseFile& file);

}  // namespace bitfold::cuda::test
