"""One sequence on several ranks: torchrun --nproc-per-node 4 examples/ten_lines.py (GPUs, or processes without any)."""

import torch
import torch.distributed as dist

from ring_core import ring_attention, shard_sequence

dist.init_process_group()
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
generator = torch.Generator(device).manual_seed(0)  # the same sequence on every rank
whole = [torch.randn(1, 1200, heads, 64, device=device, generator=generator) for heads in (8, 2, 2)]  # (B, S, H, D)
q, k, v = (shard_sequence(x, layout="zigzag").requires_grad_() for x in whole)  # this rank's part
out = ring_attention(q, k, v, causal=True, layout="zigzag")  # (B, S / world_size, H, D): its rows of the result
loss = out.square().sum()
loss.backward()  # q.grad, k.grad, v.grad: of this rank's part
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: out {tuple(out.shape)}, loss {loss.item():.6e}\n", end="")
dist.destroy_process_group()
