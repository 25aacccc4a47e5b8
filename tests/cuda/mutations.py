"""Mistakes to put into copies of the CUDA kernels, to see whether their tests would find them.

All of them are in one copy of the sources, each behind a question that the environment's BITFOLD_MUTANT answers:
one build runs them all. What is dropped or weakened wherever it stands (barriers, waits) is found by a pattern;
wrong indices and ends are a table. A row of it names text that its file has exactly once: who changes that line
changes the row.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from programs import ROOT

SOURCES = ROOT / "csrc" / "cuda"


class Mutation(NamedTuple):
    file: str  # of csrc/cuda
    start: int  # of the text that is replaced
    end: int
    text: str  # with @ where the mutant's number belongs
    what: str
    cases: tuple[str, ...]  # of kernel_cases.KERNELS
    unseen: str  # why no case can find it; empty where one must

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


# Which cases run a file's code; the first that matches.
CASES = {
    r"linear_tile\.cu|tile_copies\.hpp|chunk.*\.hpp": ("linear_tile",),
    r"tile_sums\.hpp": ("linear_tile", "linear_few", "linear_wgmma"),
    r"arrange\.cu": ("linear_tile", "linear_wgmma"),
    r"(linear_)?few.*\.hpp": ("linear_few",),
    r"linear_wgmma\.hpp|wgmma.*\.hpp": ("linear_wgmma",),
    r"linear_rows\.cu|rows_.*|tokens\.hpp|plane_.*\.hpp|fragments.*\.hpp": ("linear_rows",),
    r"linear_floor\.cu": ("linear_floor", "linear_grad_x"),
    r"int8.*\.(cu|hpp)": ("linear_int8",),
    r"decode\.cu|(whole_)?runs\.hpp": ("decode",),
    r"encode.*": ("encode",),
    r"pack\.cu": ("pack",),
    r"gptq\.cu": ("gptq_columns",),
    r"step_search\.cu": ("search_steps",),
    r"kv_pack\.cu": ("kv_pack",),
    r"kv_unpack\.cu": ("kv_unpack",),
    r"kv_blocks\.hpp": ("kv_attention", "kv_unpack"),
    r"kv_(attention|chunk|merge|packed|units)\..*": ("kv_attention",),
}

# What is dropped without notice, and why: the file, the text and which of those in the file.
UNSEEN = {
    (
        "encode_blocks.hpp",
        "ptx::sync_block();",
        4,
    ): "a block of threads comes back for more after 2^20 others alone",
    (
        "tokens.hpp",
        "ptx::sync_warp();",
        1,
    ): "the lanes meet in the shuffles before it, which on a GPU alone promise nothing of what they wrote",
    (
        "linear_few.hpp",
        "ptx::sync_warp();",
        1,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "linear_wgmma.hpp",
        "ptx::sync_warp();",
        1,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "int8_wgmma.hpp",
        "ptx::sync_warp();",
        1,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        2,
    ): "the lanes meet in the shuffles before it, which on a GPU alone promise nothing of what they read",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        3,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        5,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        6,
    ): "weights are 0 there, and only what is no number would show it (test_kv_ops.py)",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        7,
    ): "weights are 0 there, and only what is no number would show it (test_kv_ops.py)",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        8,
    ): "the lanes meet in the shuffles before it, which on a GPU alone promise nothing of what they read",
    (
        "kv_packed.hpp",
        "ptx::cp_async_wait<0>();",
        2,
    ): "weights are 0 there, and only what is no number would show it (test_kv_ops.py)",
    (
        "wgmma_copies.hpp",
        "ptx::barrier_wait(&head.w_empty[w.slot], w.parity ^ 1);",
        3,
    ): "x has no more stages than two chunks have units, and waits for them before",
}

DROPPED = [
    r"ptx::sync_block\(\);",
    r"ptx::wait_for_earlier\(\);",
    r"ptx::sync_warp\(\);",
    r"ptx::bar_(?:sync|arrive)\([^;]*\);",
    r"ptx::barrier_(?:arrive|expect|wait)\([^;]*\);",
    r"ptx::cp_async_arrive\([^;]*\);",
    r"ptx::fence_(?:async|barrier_init)\(\);",
    r"ptx::wgmma_(?:fence|commit)\(\);",
]
WAIT = r"ptx::(cp_async|wgmma)_wait<(.+)>\(\);"

# file, the expression, what it becomes
WRONG = [
    # linear_rows: who has which tile, piece, token and row
    (
        "rows_copies.hpp",
        "int64_t{args.pieces} * slice >> args.slices_log2",
        "slice * args.longest",
    ),
    ("rows_copies.hpp", "unit - slice * args.tiles", "unit % 2"),
    ("rows_copies.hpp", "args_.w.n * args_.w.row_bytes - from", "each"),
    ("rows_kernel.hpp", "i < args.rooms", "i <= args.rooms"),
    ("rows_kernel.hpp", "pair % 2 == 0 ? even_ : odd_", "even_"),
    ("rows_kernel.hpp", "step % 2 == 0 ? quad.x : quad.z", "quad.x"),
    ("rows_kernel.hpp", "step % 2 == 0 ? quad.y : quad.w", "step % 2 == 0 ? quad.x : quad.w"),
    ("rows_kernel.hpp", "scales.of[i / 2]", "scales.of[i % 2]"),
    ("rows_kernel.hpp", "before.of[i / 2]", "before.of[i % 2]"),
    ("rows_kernel.hpp", "there_ ? ptx::lane_id() / 4 : 0", "there_ ? ptx::lane_id() % 4 : 0"),
    ("rows_kernel.hpp", "smaller(2 * t + j, args.x.m - 1)", "smaller(2 * t, args.x.m - 1)"),
    ("rows_kernel.hpp", "even_ += m_ * X::kQuads", "even_ += X::kQuads"),
    ("rows_kernel.hpp", "sums_[0] += 4 * m_", "sums_[0] += 4"),
    ("rows_kernel.hpp", "total[2 * i + j]", "total[2 * j + i]"),
    ("rows_kernel.hpp", "(turn + warp - round) * args.x.m", "warp * args.x.m"),
    ("rows_kernel.hpp", "of_round * slices * each", "of_round * slices"),
    ("rows_kernel.hpp", "mine[slice * each]", "mine[slice]"),
    ("rows_kernel.hpp", "n >= args.n", "n > args.n"),
    ("rows_sums.cu", "row >= args.n", "row > args.n"),
    ("rows_sums.cu", "slice * args.m * args.rows", "slice * args.rows"),
    ("tokens.hpp", "scales.finite[token] == 0", "false"),
    ("tokens.hpp", "column < args.k", "column <= args.k"),
    ("tokens.hpp", "14 - (field - 127)", "16 - (field - 127)"),
    ("tokens.hpp", "i / kEights * args.m + token", "i / kEights * args.m + token / 2 * 2"),
    ("tokens.hpp", "four(second_run(pair, t))", "four(Source::column(step, t, 0))"),
    ("tokens.hpp", "j * kTurn + piece < pieces", "j * kTurn + piece <= pieces"),
    (
        "fragments_planes.hpp",
        "smaller(static_cast<uint32_t>(below + i), last_)",
        "static_cast<uint32_t>(below + i)",
    ),
    ("fragments_planes.hpp", "word >= pieces", "false"),
    ("fragments_k.hpp", "smaller(mine, last_)", "mine"),
    ("tokens.hpp", "power_of_two(Source::down(2 * pair + step, r) - 24)", "power_of_two(-24)"),
    (
        "plane_codes.hpp",
        "field<4>(words[step / 2] >> 8 * (step % 2), place(step, r))",
        "field<4>(words[step / 2] >> 8, place(step, r))",
    ),
    (
        "plane_codes.hpp",
        "tables.pair(words[step / 2], 2 * (step % 2) + r)",
        "tables.pair(words[step / 2], 2 * (step % 2) + 1 - r)",
    ),
    (
        "fragments_planes.hpp",
        "smaller(chunk / kChunksOfRow, last_)",
        "smaller(chunk / kChunksOfRow / 2, last_)",
    ),
    ("fragments_planes.hpp", "smaller<int64_t>(w.n - 1 - row, 15)", "15"),
    ("fragments_planes.hpp", "t * (kSectionBytes / 4)", "(t ^ 1) * (kSectionBytes / 4)"),
    ("fragments_planes.hpp", "(scale_ ^ slot.group) & 1", "slot.group & 1"),
    ("fragments_planes.hpp", "!w.whole_words", "false"),
    ("fragments_planes.hpp", "smaller(byte + 4, last)", "byte + 4"),
    (
        "fragments_planes.hpp",
        "w.zeros == nullptr && stored == stored_as<Manner::Plain>(w)",
        "stored == stored_as<Manner::Plain>(w)",
    ),
    (
        "fragments_planes.hpp",
        "mine * static_cast<uint32_t>(w.row_zeros)",
        "row_ * static_cast<uint32_t>(w.row_zeros)",
    ),
    (
        "fragments_planes.hpp",
        "w.scale == Scale::F32 || (kNested && w.scale == Scale::Nested)",
        "kNested && w.scale == Scale::Nested",
    ),
    ("fragments_ragged.hpp", "w_->high_first ? c ^ 1 : c", "c"),
    ("fragments_ragged.hpp", "(group + 1) * w_->group - column", "w_->group"),
    ("fragments_ragged.hpp", "smaller(group + section, w_->groups - 1)", "group"),
    ("fragments_ragged.hpp", "byte + j < planes.row_bytes", "true"),
    # linear_tile: stages, units, turns of warps, and who adds what
    ("tile_copies.hpp", "slot + 1 == slots ? 0 : slot + 1", "slot"),
    ("tile_copies.hpp", "next_chunk_ + 1 < p_.chunks", "true"),
    ("tile_copies.hpp", "row0_ + kTileRows <= p_.n", "row0_ <= p_.n"),
    ("tile_copies.hpp", "smaller(within + length - at, 16)", "16"),
    ("tile_copies.hpp", "smaller<int64_t>(row0_ + row, p_.n - 1)", "row0_ + row"),
    ("linear_tile.cu", "turn > 0", "turn > 1"),
    ("linear_tile.cu", "part * kXUnits + q", "part * kXUnits"),
    ("linear_tile.cu", "chunk % kColumnWarps == column_warp_", "column_warp_ == 0 || chunk > 0"),
    ("linear_tile.cu", "scale[i / 2]", "scale[i % 2]"),
    ("linear_tile.cu", "lane % 4 * 2 + i % 2", "lane % 4 * 2 + i / 2"),
    ("tile_sums.hpp", "static_cast<uint32_t>(p_.shape.splits) - 1", "0"),
    ("tile_sums.hpp", "row + i >= p_.n", "row + i > p_.n"),
    ("arrange.cu", "smaller(tokens_, args.m - first_token_)", "tokens_"),
    ("arrange.cu", "!args_.bf16", "false"),
    ("arrange.cu", "first_column_ + columns_ <= args_.k", "true"),
    ("arrange.cu", "eights * (part + 1) / args.parts", "eights * (part + 1) / (args.parts + 1)"),
    ("arrange.cu", "two & 0x7fffffffu", "two & 0x7fffu"),
    ("arrange.cu", "larger(high >> 16, low >> 17)", "high >> 16"),
    ("arrange.cu", "thread - entry + args_.order.column[entry]", "args_.order.column[entry]"),
    ("arrange.cu", "14 - (field - 127)", "16 - (field - 127)"),
    ("arrange.cu", "sub % 8 / 2", "sub % 8 / 4"),
    ("chunk_planes.hpp", "s < 2 || kNarrow ? first.zero : second.zero", "first.zero"),
    # linear_few: what a stage has and whose it is, scales of rows and halves of columns, and ends
    ("few.hpp", "groups * size.sums", "0"),
    ("few_copies.hpp", "p_.chunks * (C::kColumns / kUnit) - stage * Stage::kUnits", "Stage::kUnits"),
    ("few_copies.hpp", "stages_ * int64_t{Stage::kBytes} > p_.row_bytes", "false"),
    ("few_copies.hpp", "rows_ < kFewRows", "false"),
    ("few_copies.hpp", "smaller(larger(left - 16 * more, 0), 16)", "16"),
    ("few_copies.hpp", "at + b < length", "true"),
    ("few_copies.hpp", "stage * Stage::kUnits * each", "first_ * Stage::kUnits * each"),
    ("few_copies.hpp", "int64_t{stage} * sums", "int64_t{first_} * sums"),
    ("few_copies.hpp", "column_warp * kHalf / 32", "0"),
    (
        "few_copies.hpp",
        "ptx::shuffle_of_four(mine_[0].scale, row)",
        "ptx::shuffle_of_four(mine_[0].scale, row % 2)",
    ),
    ("few_copies.hpp", "lane_ % 4 * 8 + lane_ / 4", "lane_ % 2 * 8 + lane_ / 4"),
    ("few_copies.hpp", "end + 1 - kHalf / 32", "end"),
    ("few_copies.hpp", "bits_[i / 2] >> 16 * (i % 2)", "bits_[i / 2]"),
    ("few_copies.hpp", "group_of(stage, i) * kBits % 8", "0"),
    ("few_copies.hpp", "static_cast<uint32_t>(i * kBits)", "0"),
    ("linear_few.hpp", "this->units(stage) - column_warp_ * kUnits", "kUnits"),
    ("linear_few.hpp", "stage % kFewColumnWarps == column_warp_", "column_warp_ == 0 || stage > 0"),
    ("linear_few.hpp", "row_warp_ * (kTiles * 16)", "row_warp_ * 16"),
    ("linear_few.hpp", "lane_ % 8 + lane_ / 16 * 8", "lane_ % 8"),
    ("linear_few.hpp", "lane_ / 8 % 2 * 16", "0"),
    (
        "linear_few.hpp",
        "scales.zero(Scales::kOne ? 0 : unit * (kUnitSteps / Span) + s / Span, r, i)",
        "zero",
    ),
    ("linear_few.hpp", "x[64 * (pair + j) + 32]", "x[64 * j + 32]"),
    ("linear_few.hpp", "scale[i / 2]", "scale[i % 2]"),
    ("linear_few.hpp", "bytes + at_.sums + lane_ * C::kMins", "bytes + at_.sums"),
    ("linear_few.hpp", "turn > 0", "turn > 1"),
    ("linear_few.hpp", "lane_ % 4 * 2 + i % 2", "lane_ % 4 * 2 + i / 2"),
    ("linear_few.hpp", "16 * tile + 8 * i", "16 * tile"),
    # linear_wgmma: stages and their phases, quarters, steps, spans and whose sums
    ("wgmma_copies.hpp", "parity ^= 1", "parity"),
    ("wgmma_copies.hpp", "static_cast<int>(blockIdx.z) * Quarters", "static_cast<int>(blockIdx.z)"),
    ("wgmma_copies.hpp", "p.groups / 8 - quarter0_", "p.groups / 8 - quarter0_ - 1"),
    ("wgmma_copies.hpp", "!kSkewed<C> && p_.k % C::kColumns == 0", "true"),
    ("wgmma_copies.hpp", "last_row_ + 1 < kRows", "false"),
    ("wgmma_copies.hpp", "p_.row_bytes + 16 * (kPieceStep - kPieces<C>)", "16 * (kPieceStep - kPieces<C>)"),
    ("wgmma_copies.hpp", "smaller(within + length - at, 16)", "16"),
    ("wgmma_copies.hpp", "row0_ + smaller(row, static_cast<int>(last_row_))", "row0_ + row"),
    ("wgmma_copies.hpp", "smaller(of_batch + i / kQuads, last_row_)", "of_batch + i / kQuads"),
    ("wgmma_copies.hpp", "!C::kPlanes || p_.wide_groups", "true"),
    (
        "wgmma_copies.hpp",
        "static_cast<uint32_t>(chunk) * kSpans + i % kQuads * kQuad",
        "static_cast<uint32_t>(chunk) * kSpans",
    ),
    ("wgmma_copies.hpp", "smaller(first + kQuad / Scales * s, end)", "smaller(first, end)"),
    (
        "wgmma_copies.hpp",
        "int64_t{first_} * kUnits * step + quarter0_ * kQuarterBytes",
        "int64_t{first_} * kUnits * step",
    ),
    ("wgmma_copies.hpp", "int64_t{chunk} * p_.groups + quarter0_ * 8", "int64_t{chunk} * p_.groups"),
    ("wgmma_copies.hpp", "quarters_ * 8 * kSumBytes<C>", "8 * kSumBytes<C>"),
    ("wgmma_copies.hpp", "chunk + (batch - 1 + kAhead) / kBatches", "chunk + 1"),
    ("wgmma_copies.hpp", "(batch - 1 + kAhead) % kBatches", "batch - 1"),
    ("wgmma_copies.hpp", "static_cast<unsigned>(batch * kBatchRows)", "0u"),
    ("wgmma_copies.hpp", "batch * kBatchRows + static_cast<int>(i / kQuads)", "static_cast<int>(i / kQuads)"),
    ("wgmma_copies.hpp", "group_of<Scales>(chunk, i, s) * C::kBits % 8", "0"),
    ("wgmma_copies.hpp", "larger(peak, ptx::shuffle_xor(peak, 1))", "peak"),
    ("wgmma_copies.hpp", "i % (16 * kQuads) == 0", "i == 0"),
    ("wgmma.hpp", "kScaleLimitLog2<C> - 4 - exponent_of(peak)", "kScaleLimitLog2<C> + 4 - exponent_of(peak)"),
    ("linear_wgmma.hpp", "q * kQuarterBytes", "0"),
    ("linear_wgmma.hpp", "q * 8 * kSumBytes<C>", "0"),
    ("linear_wgmma.hpp", "unit == 0", "unit >= 0"),
    ("linear_wgmma.hpp", "down[i / 2 % 2]", "down[i % 2]"),
    ("linear_wgmma.hpp", "factor[0][i / 2 % 2]", "factor[0][i % 2]"),
    ("linear_wgmma.hpp", "factor[1][i / 2 % 2]", "1.0f"),
    ("linear_wgmma.hpp", "this->power_of(w.slot, row_ + 8)", "this->power_of(w.slot, row_)"),
    ("linear_wgmma.hpp", "power_[i] / two_to(C::kUp)", "power_[0] / two_to(C::kUp)"),
    ("linear_wgmma.hpp", "tiles.x | tiles.y | tiles.z | tiles.w", "tiles.x"),
    ("linear_wgmma.hpp", "kQuarter / 8 * kCoreBytes", "kCoreBytes"),
    ("linear_wgmma.hpp", "row_ + 8 * (i / 2 % 2)", "row_ + 8 * (i % 2)"),
    ("linear_wgmma.hpp", "quarter0_ * (kQuarter / 8)", "0"),
    ("arrange.cu", "token / kQuarter * (kQuarter / 8)", "0"),
    ("arrange.cu", "step % kUnitSteps * (2 * kQuarter * 16)", "0"),
    ("arrange.cu", "4 * (2 * two + 1) + t", "4 * (2 * two) + t"),
    ("arrange.cu", "kQuarter * mins", "kQuarter * mins / 2"),
    # int8: strips, lists, parts, pieces, and whose outlier
    ("int8_round.cu", "row + kMarkWarps * r < end", "true"),
    ("int8_round.cu", "begin + op.flag_rows", "begin + op.flag_rows - 1"),
    ("int8_round.cu", "columns << ptx::lane_id() % 8 * 4", "columns"),
    ("int8_round.cu", "part * op.words + word", "word"),
    ("int8_round.cu", "1u << within % 32", "1u << (within + 1) % 32"),
    ("int8_round.cu", "column % 32", "column % 16"),
    ("int8_round.cu", "op_.finds && !op_.per_row", "op_.finds"),
    ("int8_round.cu", "smaller(end, begin + kPartColumns)", "end"),
    ("int8_round.cu", "none ? 0 : even", "even"),
    ("int8_round.cu", "reached(op, word) & ~copied(op, word)", "reached(op, word)"),
    ("int8_round.cu", "word < first", "word <= first"),
    ("int8_round.cu", "at >= op.loose.lines", "false"),
    ("int8_round.cu", "op.x.rows * (part + 1) / parts", "op.x.rows / parts"),
    ("int8_round.cu", "smaller(op.copies, op.exact.lines)", "op.copies"),
    ("int8_round.cu", "word < words", "word <= words"),
    ("int8.hpp", "token * op.parts + part", "token * op.parts"),
    ("int8.hpp", "32 * word + 31", "31"),
    ("int8.hpp", "bits != 0 && i < lines", "bits != 0"),
    ("int8.hpp", "op.one_scale ? 0 : row", "0"),
    ("int8.hpp", "!op.per_row || reaches(op, x)", "true"),
    ("int8_rows.cu", "column < k", "true"),
    ("int8_rows.cu", "column + i < k", "true"),
    ("int8_rows.cu", "op_.n - 1", "op_.n"),
    ("int8_rows.cu", "first_token + thread / kRows", "thread / kRows"),
    ("int8_rows.cu", "r % 8 * 4 + t / 2", "r % 8 * 4 + t % 2"),
    ("int8_rows.cu", "token < op.x.rows && row < op.n", "row < op.n"),
    ("int8_rows.cu", "tile == blockIdx.x", "false"),
    ("int8_rows.cu", "pieces < warps * kRooms", "false"),
    ("int8_rows.cu", "column / 16 != ptx::lane_id() % 4", "column / 16 == ptx::lane_id() % 4"),
    ("int8_rows.cu", "codes[column % 16]", "codes[column % 8]"),
    ("int8_rows.cu", "static_cast<float>(-zero)", "-128.0f"),
    ("int8_tile.cu", "column < op_.k", "true"),
    ("int8_tile.cu", "smaller(line_of(turn), last_row_)", "line_of(turn)"),
    ("int8_tile.cu", "token <= last_token_", "false"),
    ("int8_tile.cu", "stage == 0 ? S::kStages - 1 : stage - 1", "stage"),
    ("int8_tile.cu", "row0() + smaller(row, memory_.last_row)", "row0()"),
    ("int8_tile.cu", "i * op_.table_rows + row0() + row", "i * op_.table_rows + row"),
    ("int8_tile.cu", "warp_token() + 8 * j + 2 * t + i", "warp_token() + 8 * j + 2 * t"),
    ("int8_tile.cu", "token > last_token_", "false"),
    ("int8_tile.cu", "blockIdx.x % token_tiles", "0"),
    ("int8_tile.cu", "pieces * blockIdx.y / splits", "0"),
    ("int8_tile.cu", "blockIdx.y * op_.x.rows", "0"),
    ("int8_wgmma.hpp", "static_cast<int>(row_tile) * kWideRows", "0"),
    ("int8_wgmma.hpp", "static_cast<int>(token_tile) * Tokens", "0"),
    ("int8_wgmma.hpp", "i * kWidePieces", "0"),
    ("int8_wgmma.hpp", "ptx::warp_id() / 4 * 64", "0"),
    ("int8_wgmma.hpp", "column ^ row % 8 * 16", "column"),
    ("int8_wgmma.hpp", "smaller<int64_t>(row0_ + row, op_.n - 1)", "row"),
    ("int8_wgmma.hpp", "piece * kInt8Piece + of_piece", "of_piece"),
    ("int8_wgmma.hpp", "i * op_.table_rows + row0_ + row", "i * op_.table_rows + row"),
    ("int8_wgmma.hpp", "blockIdx.y * op_.x.rows", "0"),
    ("int8_wgmma.hpp", "stages * blockIdx.y / splits", "0"),
    ("int8_wgmma.hpp", "token > last_token_", "false"),
    ("int8_wgmma.hpp", "release(before)", "release(turn.stage)"),
    ("int8_finish.cu", "op_.tiles.wide ? 0 : 128", "128"),
    ("int8_finish.cu", "begin >= lines.lines", "false"),
    ("int8_finish.cu", "op_.x.dtype != DType::F32", "true"),
    ("int8_finish.cu", "smaller(row0_ + row, op_.n - 1)", "row0_ + row"),
    ("int8_finish.cu", "smaller(token0_ + token, op_.x.rows - 1)", "token0_ + token"),
    ("int8_finish.cu", "row0_ + row >= op_.n", "false"),
    ("int8_finish.cu", "op_.x.rows - token0_", "kTokens"),
    ("int8_finish.cu", "c < columns", "c < kColumns"),
    ("int8_finish.cu", "from += op_.x.rows * op_.table_rows", "from += 0"),
    # decode: rows, runs and ends
    ("whole_runs.hpp", "codes >> 2 & kPlaces", "codes & kPlaces"),
    ("whole_runs.hpp", "(bit & 7u) + kBits > 8", "(bit & 7u) + kBits > 9"),
    ("whole_runs.hpp", "places[i].scale / kNestedGroup", "places[i].scale / (2 * kNestedGroup)"),
    (
        "decode.cu",
        "smaller(first + static_cast<uint32_t>(step * kThreads), total - 1)",
        "first + static_cast<uint32_t>(step * kThreads)",
    ),
    ("decode.cu", "tile + kTileRuns<Row> <= total", "tile < total"),
    ("runs.hpp", "4 * (r >> 2 & 1)", "4 * (r >> 3 & 1)"),
    # encode: ends, and who has which number
    ("encode_blocks.hpp", "smaller<int64_t>(kThreads, blocks - first)", "kThreads"),
    (
        "encode_blocks.hpp",
        "room.x[b][ptx::lane_id() + i * kWarp]",
        "room.x[b][ptx::lane_id() + (kEach - 1 - i) * kWarp]",
    ),
    ("encode_blocks.hpp", "count * room.kBytes", "(count - 1) * room.kBytes"),
    ("encode_blocks.cu", "room.x[lane][i] * room.x[lane][i]", "room.x[i][lane] * room.x[i][lane]"),
    ("encode.cu", "bitfold::ceil_div(count - i, kWarp)", "kTogether"),
    ("encode.cu", "g % a.groups * a.group", "0"),
    ("encode.cu", "i == left && i < present", "false"),
    ("encode.cu", "first / kPiece * kBits", "first / kPiece * (kBits - 1)"),
    ("encode.cu", "bitfold::ceil_div(present * kBits, 8)", "kBits"),
    ("encode.cu", "r * a.groups + first + i", "first + i"),
    ("encode.cu", "smaller(count, (g + 1) * kNestedGroup)", "(g + 1) * kNestedGroup"),
    # linear_floor and linear_grad_x: ends, tokens and whose sums
    ("linear_floor.cu", "row >= w.n", "row > w.n"),
    ("linear_floor.cu", "(first + j) * w.n + row", "first * w.n + row"),
    ("linear_floor.cu", "from_lane(sums[j], mask)", "from_lane(sums[j], mask / 2)"),
    ("linear_floor.cu", "start + thread < w.k", "true"),
    ("linear_floor.cu", "room.sums[warp][thread]", "room.sums[warp / 2][thread]"),
    ("linear_floor.cu", "row * a.x.column_stride", "row * a.x.row_stride"),
    # pack
    ("pack.cu", "i >= s.rows * pieces", "i > s.rows * pieces"),
    ("pack.cu", "smaller<int64_t>(kCodes, s.columns - piece * kCodes)", "kCodes"),
    ("pack.cu", "piece * s.bits", "piece * (s.bits - 1)"),
    # gptq: ends, whose column, error and sum, and the order of what is added
    ("gptq.cu", "c < panel.width && l < count", "c < panel.width && l <= count"),
    ("gptq.cu", "l < count && row < n", "l < count"),
    ("gptq.cu", "at < columns", "at <= columns"),
    ("gptq.cu", "at - columns", "at"),
    ("gptq.cu", "op.begin + panel.begin + c", "panel.begin + c"),
    ("gptq.cu", "op.begin + column", "column"),
    ("gptq.cu", "level < next", "true"),
    ("gptq.cu", "smaller(i + 1, last)", "smaller(i + 1, last - 1)"),
    ("gptq.cu", "spot.step == 0.0f", "false"),
    ("gptq.cu", "panel.width - kLanes * i", "kLanes"),
    ("gptq.cu", "lane == owner", "lane == 0"),
    ("gptq.cu", "other < c", "other < c - 1"),
    ("gptq.cu", "op.group[column]", "op.group[c]"),
    ("gptq.cu", "larger<int64_t>(0, end - kPanel)", "larger<int64_t>(0, end - kPanel / 2)"),
    ("gptq.cu", "lane == 0 && row < op.weight.rows", "lane == 0"),
    # step_search: ends, whose start, column and step, and which of the best
    ("step_search.cu", "c < count && start != 0.0f", "start != 0.0f"),
    (
        "step_search.cu",
        "(spot.first_row + r) * args.weight.columns + first + c",
        "(spot.first_row + r) * args.weight.columns + c",
    ),
    ("step_search.cu", "cost * args.importance[first + c]", "cost * args.importance[c]"),
    ("step_search.cu", "i < args.tried && start != 0.0f", "start != 0.0f"),
    ("step_search.cu", "begin + args.group", "begin + args.group - 1"),
    ("step_search.cu", "(level + next) * 0.5f", "level"),
    ("step_search.cu", "int64_t{blockIdx.x / groups} * kRows", "0"),
    ("step_search.cu", "group * args.weight.rows + first_row", "group * args.weight.rows"),
    ("step_search.cu", "cost < least ? i : best", "cost <= least ? i : best"),
    ("step_search.cu", "thread < kRows && spot.first_row + thread < args.weight.rows", "thread < kRows"),
    ("step_search.cu", "step_of(args, room.start[row], best)", "step_of(args, room.start[row], 0)"),
    # kv_pack: ends, and whose step
    ("kv_pack.cu", "g * count", "0 * count"),
    ("kv_pack.cu", "c < padded", "c < count"),
    ("kv_pack.cu", "i < job.at.bytes", "i < end"),
    ("kv_pack.cu", "head % job.heads * strides[1]", "head * strides[1]"),
    # kv_attention: which page, token, mask and query, and what an earlier block's sums become
    ("kv_chunk.hpp", "job_.runs[run_ + 1].begin <= block", "job_.runs[run_ + 1].begin < block"),
    ("kv_chunk.hpp", "r % job.rows * job.mask_strides[2]", "0"),
    ("kv_packed.hpp", "job_.first - number * kTokens", "0 * number"),
    ("kv_packed.hpp", "expf(most_ - most)", "1.0f"),
    ("kv_units.hpp", "odd ? number : rest", "number"),
    (
        "kv_units.hpp",
        "static_cast<uint32_t>(ptx::float_to_int(x)) + 0x808080u",
        "static_cast<uint32_t>(ptx::float_to_int(x))",
    ),
    ("kv_units.hpp", "unit *= 0x1p-4f", "unit *= 1.0f"),
    ("kv_packed.hpp", "part > 0 && groups_ == 1", "part > 0"),
    ("kv_packed.hpp", "(groups_ == 1 ? 0 : p) * kValueSteps", "p * kValueSteps"),
    ("kv_packed.hpp", "expf(room_.own[w].result.most[q] - most)", "1.0f"),
    ("kv_packed.hpp", "of_query(sum_of(offset_sums_[p]))", "0.0f"),
    ("kv_packed.hpp", "number + kKvWarps < end", "false"),
    ("kv_merge.cu", "larger(memory.most[w], most)", "most"),
    ("kv_merge.cu", "expf(mosts[i] - now)", "1.0f"),
    ("kv_chunk.cu", "t < hidden", "t <= hidden"),
    ("kv_chunk.cu", "expf(most_ - most)", "1.0f"),
    ("kv_chunk.cu", "job_.blocks_end * job_.shape.group - job_.first + token", "token"),
    ("kv_chunk.cu", "r < job_.queries", "true"),
    ("kv_chunk.cu", "(place_.chunk - job_.packed_chunks)", "(0 * place_.chunk)"),
    ("kv_chunk.cu", "sums_[q][i] += constant_[q]", "sums_[q][i] += 0.0f"),
    ("kv_blocks.hpp", "word >> 4 & 0x0f0f0f0fu", "word & 0xf0f0f0fu"),
    # kv_unpack: which page, token, channel and step, and ends
    ("kv_unpack.cu", "job.runs[middle].begin <= block", "job.runs[middle].begin < block"),
    ("kv_unpack.cu", "token >= tile.hidden", "token > tile.hidden"),
    ("kv_unpack.cu", "token + 1 >= tile.hidden", "token >= tile.hidden"),
    ("kv_unpack.cu", "t >= tile.hidden", "t > tile.hidden"),
    ("kv_unpack.cu", "present == 2 ? left + kPitch / 2 : left", "left"),
    ("kv_unpack.cu", "smaller(2, head - d)", "2"),
    ("kv_unpack.cu", "smaller(kKvWord, head - d)", "kKvWord"),
    ("kv_unpack.cu", "present < Count", "false"),
    ("kv_unpack.cu", "0x7362u", "0x6372u"),
    ("kv_unpack.cu", "int64_t{d / static_cast<int>(job.shape.value_group)} * group", "0"),
    ("kv_unpack.cu", "smaller(kTile, group - tile.token)", "kTile"),
    ("kv_unpack.cu", "all % 16 == 0", "all % 8 == 0"),
]


def cases_of(file: str) -> tuple[str, ...]:
    return next((cases for pattern, cases in CASES.items() if re.fullmatch(pattern, file)), ())


def texts_of_sources() -> dict[str, str]:
    return {
        path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".hpp")
    }


def stale() -> list[tuple[str, str]]:
    """Rows of WRONG whose text is no longer there, or more than once."""
    texts = texts_of_sources()
    return [(file, right) for file, right, _ in WRONG if texts.get(file, "").count(right) != 1]


def find() -> list[Mutation]:
    found = []
    texts = texts_of_sources()
    for file, text in texts.items():
        cases = cases_of(file)
        if not cases:
            continue
        for pattern in [*DROPPED, WAIT]:
            for nth, match in enumerate(re.finditer(pattern, text), 1):
                line = text.count("\n", 0, match.start()) + 1
                if pattern == WAIT:
                    weak = f"ptx::{match[1]}_wait<({match[2]}) + 1>();"
                    code, what = (
                        f"{{ if (mutant(@)) {{ {weak} }} else {{ {match[0]} }} }}",
                        f"line {line} becomes {weak}",
                    )
                else:
                    code, what = f"{{ if (!mutant(@)) {{ {match[0]} }} }}", f"line {line} without {match[0]}"
                unseen = UNSEEN.get((file, match[0], nth), "")
                found.append(Mutation(file, match.start(), match.end(), code, what, cases, unseen))
    for file, right, wrong in WRONG:
        if texts.get(file, "").count(right) == 1:
            start = texts[file].index(right)
            code, what = f"(mutant(@) ? ({wrong}) : ({right}))", f"{right} becomes {wrong}"
            found.append(Mutation(file, start, start + len(right), code, what, cases_of(file), ""))
    return found


# Read at run time, and never true where the compiler evaluates.
HEADER = """#pragma once
#include <cstdlib>
#include <type_traits>
namespace bitfold {
inline const int chosen_mutant = std::getenv("BITFOLD_MUTANT") ? std::atoi(std::getenv("BITFOLD_MUTANT")) : 0;
constexpr bool mutant(int number) { return !std::is_constant_evaluated() && chosen_mutant == number; }
}  // namespace bitfold
"""


def write(mutations: list[Mutation], folder: Path) -> None:
    """The sources with all mutations, numbered from 1, in `folder`; files that are so already aren't touched."""
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc", "tests/cuda", "third_party"):
        source = ROOT / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            content = path.read_text()
            if path.parent == SOURCES:
                content = mutated(
                    content, [(i, m) for i, m in enumerate(mutations, 1) if m.file == path.name]
                )
            update(folder / path.relative_to(ROOT), content)
    update(folder / "csrc" / "mutant.hpp", HEADER)


def mutated(content: str, mutations: list[tuple[int, Mutation]]) -> str:
    """Where mutations lie within others, the inner ones come first and are lost: their places must be disjoint."""
    last = len(content)
    for number, mutation in sorted(mutations, key=lambda numbered: -numbered[1].start):
        assert mutation.end <= last, f"{mutation}: overlaps another"
        last = mutation.start
        content = (
            content[: mutation.start] + mutation.text.replace("@", str(number)) + content[mutation.end :]
        )
    return content


def update(path: Path, content: str) -> None:
    if not path.exists() or path.read_text() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
