"""The pass is what it says: run with pytest; MOBIZO_ACCEPT=1 writes the golden text anew."""

from pathlib import Path

from mobizo_silu import SpellOutSilu

from mobizo_compiler.testing import check_pass

PROGRAM = """
tensor %p_up_weight: f32[8, 6]
input  %x: f32[rows, 6]
  %linear = linear(%x, %p_up_weight)
  %silu = silu(%linear)
return output_0 = %silu
"""


def test_silu() -> None:
    """The golden text, and the numbers before and after."""
    check_pass(SpellOutSilu(), PROGRAM, golden=Path(__file__).parent / "silu.txt")
