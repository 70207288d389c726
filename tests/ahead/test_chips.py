"""Makers' sheets."""

import pytest

from keysync_jax.ahead.chips import chip_of, device_peak
from keysync_jax.errors import UserError


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L4", 121e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_peaks_of_known_devices(kind: str, peak: float | None) -> None:
    assert device_peak(kind) == peak


def test_a_chip_without_a_sheet_is_no_guess() -> None:
    assert chip_of("TPU v6 lite").hbm == 32 * 2**30
    with pytest.raises(UserError, match="nothing is known of the chip TPU v99"):
        chip_of("TPU v99")
