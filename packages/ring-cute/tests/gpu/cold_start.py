"""From `import ring_cute` to a first result, in a process whose torch and CUDA are ready: `cold_start.py [HEAD_DIM]`.

Prints one line of JSON: seconds of the import, until the first output is on the device, and with the gradients; whether
the DSL was imported and what was compiled. The cache should be warm (`python -m ring_cute.compile`).
"""

from __future__ import annotations

import json
import sys
import time

import torch


def main(head_dim: int) -> None:
    device = torch.device("cuda", 0)
    q, k, v = (
        torch.randn(1, 2048, heads, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    dout = torch.randn_like(q)
    torch.cuda.synchronize()

    found: dict[str, object] = {"head_dim": head_dim, "gpu": torch.cuda.get_device_name()}
    begin = time.perf_counter()
    import ring_cute

    found["import_s"] = time.perf_counter() - begin
    with torch.no_grad():
        ring_cute.cute_ring_flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    found["first_result_s"] = time.perf_counter() - begin
    ring_cute.cute_ring_flash_attn_func(q, k, v, causal=True).backward(dout)
    torch.cuda.synchronize()
    found["first_gradients_s"] = time.perf_counter() - begin
    found["dsl_imported"] = "cutlass" in sys.modules
    found["finite"] = bool(torch.isfinite(q.grad).all()) if q.grad is not None else False
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
