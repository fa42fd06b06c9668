"""Pairs of tokens and experts put in the order of their experts, and cut into tiles, without asking the host.

P pairs (token * K + choice), E experts, BM rows of a tile. Everything lies in one buffer `meta` of int32:
[0] number of tiles; [4 : 4+E+1] offsets; from `at_tiles` each tile's expert, then each tile's first row (`max_tiles`
numbers each); then order[P], the pairs by expert, by number within one. Pairs without an expert come last, outside
every tile.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra import cuda

from moec.backends.triton.kernels.address import load_expert, valid_tokens

OFFSETS = 4
SMALL_PAIRS = 4096
"""Up to so many pairs each finds its own place by comparing itself with all others."""
CHUNK = 256
"""Pairs of a chunk when there are more."""
LANE_PAIRS = 32
STEP = 128


def at_tiles(experts: int) -> int:
    """Where the tiles start in `meta`: a multiple of 4."""
    return (OFFSETS + experts + 1 + 3) // 4 * 4


def max_tiles(pairs: int, experts: int, rows: int) -> int:
    """The most tiles of so many rows that any routing of the pairs gives."""
    hit = min(pairs, experts)
    return hit + (pairs - hit) // rows


@triton.jit
def write_tiles(meta, counts, rows, most, E: tl.constexpr, EB: tl.constexpr, AT: tl.constexpr):
    """counts[EB] of the experts -> offsets and tiles of `rows` rows in meta."""
    e = tl.arange(0, EB)
    ends = tl.cumsum(counts, axis=0)
    starts = ends - counts
    tl.store(meta + 4 + e, starts, mask=e < E)
    tl.store(meta + 4 + E, tl.sum(counts, axis=0))
    tiles = (counts + rows - 1) // rows
    first = tl.cumsum(tiles, axis=0) - tiles
    tl.store(meta, tl.sum(tiles, axis=0))
    longest = tl.max(tiles, axis=0)
    for i in tl.range(0, longest):
        tl.store(meta + AT + first + i, e, mask=i < tiles)
        tl.store(meta + AT + most + first + i, starts + i * rows, mask=i < tiles)


@triton.jit(do_not_specialize=["pairs", "rows", "most"], do_not_specialize_on_alignment=["ids", "valid"])
def group_small(ids, valid, meta, pairs, rows, most,
                K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, AT: tl.constexpr, HAS_VALID: tl.constexpr,
                CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """ids[P] -> meta. Grid: 1 + P / CHUNK; the first program cuts tiles, each other one places CHUNK pairs."""
    if PDL:
        cuda.gdc_launch_dependents()
    limit = valid_tokens(valid, pairs // K, HAS_VALID) * K
    if tl.program_id(0) == 0:
        counts = tl.zeros([EB], dtype=tl.int32)
        for start in tl.range(0, pairs, BLOCK):
            e = load_expert(ids, start + tl.arange(0, BLOCK), limit, E)
            counts += tl.histogram(tl.where(e < E, e, 0), EB, mask=e < E)
        write_tiles(meta, counts, rows, most, E, EB, AT)
    else:
        pair = (tl.program_id(0) - 1) * CHUNK + tl.arange(0, CHUNK)
        key = load_expert(ids, pair, limit, E) * pairs + pair
        # Counted in two dimensions and summed once, because a sum across threads costs more than the comparisons.
        smaller = tl.zeros([CHUNK, STEP], dtype=tl.int32)
        for start in tl.range(0, pairs, STEP):
            other = start + tl.arange(0, STEP)
            keys = tl.where(other < pairs, load_expert(ids, other, limit, E) * pairs + other, 2147483647)
            smaller += (keys[None, :] < key[:, None]).to(tl.int32)
        place = tl.sum(smaller, axis=1)
        tl.store(meta + AT + 2 * most + place, pair, mask=pair < pairs)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["ids", "valid"])
def count_chunks(ids, valid, counts, pairs, K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr,
                 HAS_VALID: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """ids[P] -> counts i32[P / CHUNK, EB], how many pairs of each chunk each expert has; bin E holds those of none."""
    if PDL:
        cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    limit = valid_tokens(valid, pairs // K, HAS_VALID) * K
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    e = load_expert(ids, pair, limit, E)
    tl.store(counts + chunk * EB + tl.arange(0, EB), tl.histogram(e, EB, mask=pair < pairs))


@triton.jit(do_not_specialize=["chunks"])
def sum_chunks(counts, chunks, EB: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """counts i32[chunks + 1, EB] -> the sums of the chunks before each, in place; the last row: all. Grid: EB / BE."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    carry = tl.zeros([BE], dtype=tl.int32)
    for start in tl.range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        at = counts + chunk[:, None] * EB + e[None, :]
        found = tl.load(at, mask=chunk[:, None] < chunks, other=0)
        tl.store(at, carry[None, :] + tl.cumsum(found, axis=0) - found, mask=chunk[:, None] < chunks)
        carry += tl.sum(found, axis=0)
    tl.store(counts + chunks * EB + e, carry)


@triton.jit(do_not_specialize=["pairs", "chunks", "rows", "most"], do_not_specialize_on_alignment=["ids", "valid"])
def place_chunks(ids, valid, counts, meta, pairs, chunks, rows, most,
                 K: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, AT: tl.constexpr, HAS_VALID: tl.constexpr,
                 CHUNK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """ids[P], what `sum_chunks` wrote -> meta. Grid: 1 + P / CHUNK, as in `group_small`."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    lane = tl.arange(0, EB)
    total = tl.load(counts + chunks * EB + lane)
    if tl.program_id(0) == 0:
        write_tiles(meta, tl.where(lane < E, total, 0), rows, most, E, EB, AT)
    else:
        chunk = tl.program_id(0) - 1
        limit = valid_tokens(valid, pairs // K, HAS_VALID) * K
        i = tl.arange(0, CHUNK)
        pair = chunk * CHUNK + i
        e = load_expert(ids, pair, limit, E)
        before = tl.cumsum(total, axis=0) - total + tl.load(counts + chunk * EB + lane)
        earlier = tl.zeros([CHUNK, STEP], dtype=tl.int32)
        for start in tl.range(0, CHUNK, STEP):
            j = start + tl.arange(0, STEP)
            e_j = load_expert(ids, chunk * CHUNK + j, limit, E)
            earlier += ((e_j[None, :] == e[:, None]) & (j[None, :] < i[:, None])).to(tl.int32)
        place = tl.gather(before, e, axis=0) + tl.sum(earlier, axis=1)
        tl.store(meta + AT + 2 * most + place, pair, mask=pair < pairs)
