"""GPUs by name: memory, arithmetic and links, from the makers' data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, dense FLOP/s of matrix products, `link` to the machine's other GPUs in bytes/s per direction.

    Args:
        bf16, fp32: in these precisions, as PyTorch computes them.
        fp16: None if it is as fast as bf16.
    """

    memory: float
    bf16: float
    fp32: float
    link: float
    fp16: float | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16; if not, PyTorch emulates it, no faster than fp32."""
        return self.bf16 > self.fp32

    def rate(self, precision: str) -> float:
        """Return FLOP/s in `precision`: "fp32", "bf16" or "fp16"."""
        return {"fp32": self.fp32, "bf16": self.bf16, "fp16": self.fp16 or self.bf16}[precision]


GPUS = {
    "a10": Gpu(24e9, 125e12, 62.5e12, 32e9),
    "a100": Gpu(80e9, 312e12, 156e12, 300e9),
    "b200": Gpu(180e9, 2250e12, 1100e12, 900e9),
    "h100": Gpu(80e9, 989e12, 494e12, 450e9),
    "h200": Gpu(141e9, 989e12, 494e12, 450e9),
    "l40s": Gpu(48e9, 362e12, 183e12, 32e9),
    "mi300x": Gpu(192e9, 1307e12, 163e12, 448e9),
    "rtx4090": Gpu(24e9, 165e12, 83e12, 32e9),
    "rtx5090": Gpu(32e9, 209.5e12, 105e12, 64e9),
    "t4": Gpu(16e9, 8.1e12, 8.1e12, 16e9, fp16=65e12),
}
"""Rates are without sparsity, which doubles most data sheets' figures; those of GeForce cards accumulate in fp32.

Sources: the data sheets "NVIDIA A10", "A100", "H100", "H200", "L40S", "T4" and "AMD Instinct MI300X"; "Blackwell
Architecture Technical Brief" (HGX B200) and "DGX B200" (1,440 GB in eight GPUs); the white papers "Ada GPU
Architecture" and "RTX Blackwell GPU Architecture", appendix A.

fp32 is TF32 on NVIDIA's cards since Ampere. The T4 has neither TF32 nor bf16: both run at its plain fp32 rate, and only
fp16 uses its tensor cores. The MI300X has TF32 (654 TFLOP/s), which PyTorch leaves off; its fp32 is that of the matrix
cores.

Links, both directions together: NVLink, 600 GB/s (A100), 900 (H100, H200) and 1,800 (B200); seven Infinity Fabric links
of 128 GB/s each (MI300X); PCIe x16 of the third generation, 32 GB/s (T4), of the fifth, 128 (RTX 5090), and of the
fourth, 64 (the others).
"""
