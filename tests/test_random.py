"""The counter-based generator of the kernels."""

from recfast import _C


def test_philox_known_answers():
    """The three vectors that the authors of Philox publish for philox4x32-7 (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    assert _C.philox4x32(0, 0, 0, 0, 0) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert _C.philox4x32(2**64 - 1, ones, ones, ones, ones) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = 0xA4093822 | 0x299F31D0 << 32
    assert _C.philox4x32(key, *pi) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)
