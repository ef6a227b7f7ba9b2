"""Documents of any length on several ranks: torchrun --nproc-per-node 4 examples/packed.py (GPUs, or CPUs if none)."""

import torch
import torch.distributed as dist

from ring_core import plan_packed, ring_attention_packed

dist.init_process_group()
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
generator = torch.Generator(device).manual_seed(0)  # the same stream on every rank
cu_seqlens = [0, 700, 701, 1000, 1937]  # where documents begin in the stream of all ranks, and its length
plan = plan_packed(cu_seqlens, layout="balanced", causal=True)  # once a batch, for all layers
whole = [torch.randn(1937, heads, 64, device=device, generator=generator) for heads in (8, 2, 2)]  # (T, H, D)
q, k, v = (plan.shard(x).requires_grad_() for x in whole)  # this rank's tokens; plan.positions(device) is for RoPE
out = ring_attention_packed(q, k, v, plan)  # (T / world_size, H, D): each document attends to itself
loss = out.square().sum()
loss.backward()  # q.grad, k.grad, v.grad: of this rank's tokens
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: out {tuple(out.shape)}, loss {loss.item():.6e}\n", end="")
dist.destroy_process_group()
