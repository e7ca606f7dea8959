"""The counter-based generator of the kernels."""

from recfast import _C


def test_philox_known_answers():
    """The three vectors that the authors of Philox publish for philox4x32-10 (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    assert _C.philox4x32(0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _C.philox4x32(2**64 - 1, ones, ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = 0xA4093822 | 0x299F31D0 << 32
    assert _C.philox4x32(key, *pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
