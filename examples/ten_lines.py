"""One sequence on several ranks: torchrun --nproc-per-node 4 examples/ten_lines.py (GPUs, or processes without any)."""

import torch
import torch.distributed as dist

from ring_core import ring_attention, shard_sequence, unshard_sequence

dist.init_process_group()
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
generator = torch.Generator(device).manual_seed(0)
whole = [torch.randn(1, 1200, heads, 64, device=device, generator=generator) for heads in (8, 2, 2)]  # (B, S, H, D)

q, k, v = (shard_sequence(x, layout="zigzag").requires_grad_() for x in whole)  # this rank's part of the sequence
out = ring_attention(q, k, v, causal=True, layout="zigzag")  # (B, S / world_size, H, D)
out.square().sum().backward()  # q.grad, k.grad, v.grad: of the local parts

q, k, v = (x.transpose(1, 2) for x in whole)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
error = (unshard_sequence(out.detach(), layout="zigzag") - expected).abs().max().item()
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: largest difference from one device {error:.1e}")
dist.destroy_process_group()
