"""What is stored of a linear, number by number, and that it gives the linear's weight back exactly."""

import math

import pytest
import torch

from compress.models.packing import Kept, pack_bits, pack_words
from compress.models.storage import empty_linear, unpacked
from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import unpack_bits
from matrices import args_of
from stored import label, random_parts, storage_of

M, N = 37, 480
BITS = range(2, 9)
GROUPS: list[int | str] = ["tensor", "channel", 16]
PATTERNS = [None, Pattern(2.0, 4), Pattern(4.0, 8), Pattern(3.0, 5), Pattern(8.0, 16)]
PACKED = [
    *(storage_of("packed", bits, group=16, rank=3) for bits in BITS),
    *(storage_of("packed", 3, group=group, symmetric=False) for group in GROUPS),
    *(storage_of("packed", 8, type="float", group=group, input_activations="fp8") for group in GROUPS),
    storage_of("packed", 8, symmetric=False, input_activations="int8"),
    *(storage_of("packed", 4, type="float", group=group, rank=3) for group in (16, 32)),
    storage_of("packed", None, rank=3),
    storage_of("packed", 4, pattern=Pattern(2.0, 4)),
    storage_of("packed", 4, pattern=Pattern(0.5)),
]
COMPACT = [
    *(storage_of("compact", bits, pattern=Pattern(2.0, 4), rank=3) for bits in (*BITS, None)),
    *(storage_of("compact", bits, pattern=pattern) for bits in (3, None) for pattern in PATTERNS),
    *(storage_of("compact", 4, pattern=Pattern(2.0, 4), group=group) for group in (*GROUPS, 100)),
    storage_of("compact", 8, type="float", pattern=Pattern(2.0, 4)),
    storage_of("compact", 4, important_inputs=True, group=16),
    storage_of("compact", 4, pattern=Pattern(0.5)),
    storage_of("compact", 4, rank=5, adapter=args_of(4, 128)),
]


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for count in (1, 31, 100):
        torch.manual_seed(count)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, count), dtype=torch.int8)
        words = pack_words(codes, bits)
        assert torch.equal(words, helpers.pack_to_int32(codes, bits))
        assert torch.equal(unpacked(words, bits, count), codes)
        assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize(("bits", "count"), [(1, 1), (3, 8), (7, 13), (14, 64)])
def test_numbers_come_back_from_their_bits(bits, count):
    torch.manual_seed(count)
    numbers = torch.randint(2**bits, (3, count))
    planes = pack_bits(numbers, bits)
    assert planes.shape == (3, math.ceil(count / 8) * bits)
    assert torch.equal(unpack_bits(planes, bits, count).long(), numbers)


def test_places_are_numbered_as_combinations_are_listed():
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1]]).bool()
    kept = Kept(mask, Pattern(2.0, 4))
    assert unpack_bits(kept.places(), 3, 3).tolist() == [[0, 5, 4]]
    assert kept.of(torch.arange(12)[None]).tolist() == [[0, 6, 9, 1, 7, 11]]


@pytest.mark.parametrize("storage", PACKED + COMPACT, ids=label)
def test_the_weight_comes_back_exactly(storage):
    dtype = torch.bfloat16
    parts = random_parts(storage, M, N, dtype)
    linear = parts.stored(storage, dtype)
    with torch.device("meta"):
        empty = empty_linear(storage, N, M, bias=True, dtype=dtype)
    kinds = ({name: (t.shape, t.dtype) for name, t in each.state_dict().items()} for each in (empty, linear))
    assert next(kinds) == next(kinds)

    expected = parts.S if parts.grid is not None else parts.S.to(dtype).double()
    assert torch.equal(linear.rows(0, M, torch.float64), expected)
    assert torch.equal(linear.rows(11, 35, torch.float64), expected[11:35])
    kept = N * storage.pattern.density if storage.form == "compact" and storage.left_out else N
    assert linear.num_parameters == empty.num_parameters == M * kept + storage.rank * (M + N) + M


def test_compact_takes_the_bytes_it_says():
    """2:4 at 4 bits: 2 bits of codes and 3/4 of a bit for the places; a scale for each 128; an adapter at 4 bits."""
    m, n, r = 256, 512, 16
    storage = storage_of("compact", 4, group=128, pattern=Pattern(2.0, 4), rank=r, adapter=args_of(4, 128))
    with torch.device("meta"):
        linear = empty_linear(storage, n, m, bias=True, dtype=torch.bfloat16)
    found = {name: t.nbytes for name, t in linear.state_dict().items()}
    assert found == {
        "weight.codes": m * n // 4,
        "weight.places": m * n * 3 // 32,
        "weight.scale": 2 * m * n // 128,
        "first.codes": r * n // 2,
        "first.scale": 2 * r * n // 128,
        "second.codes": r * m // 2,
        "second.scale": 2 * r * m // 128,
        "bias": 2 * m,
    }
