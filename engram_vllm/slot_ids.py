"""IdsBySlot: the ids before a request's first scheduled token, in vLLM's model runner V1.

vLLM runs V1 on a CPU without Triton. It hands over no ids of generated tokens, so the id that is written to each slot
of the KV cache is remembered, and earlier slots are found by the block table, as attention does.
Promises: chunked prefill, prefix-cache hits, preemption and any order of requests are the same look-up. A cache that
is laid out otherwise raises an error. Never keeps state of a request by its place in the batch.
Source: vLLM 0.32, `vllm/v1/worker/block_table.py`.
"""

import torch


class IdsBySlot:
    """The id of the token in each slot of the KV cache, for model runner V1.

    Args:
        reach (`int`): ids before a request's first token that are needed.
        block_size (`int`): tokens in a block of the KV cache.
    """

    def __init__(self, reach: int, block_size: int):
        self.reach, self.block_size = reach, block_size
        self.ids = torch.empty(0, dtype=torch.int64, device="cpu")  # (slots,), as many as were written to

    def history(self, ids: torch.Tensor, metadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Remembers a batch, and returns where its requests begin, `(R + 1,)`, and ids before them, `(R, N - 1)`.

        Args:
            ids (`torch.LongTensor` of shape `(T,)`): the batch.
            metadata: vLLM's attention metadata of one layer.

        Raises:
            `RuntimeError`: if the block table does not lead to the slots of the batch.
        """
        starts, lengths = metadata.query_start_loc.long(), metadata.seq_lens.long()  # (R + 1,), (R,)
        slots, table = metadata.slot_mapping.long()[: int(starts[-1])], metadata.block_table.long()
        top = int(slots.max()) + 1
        if top > len(self.ids):
            self.ids = torch.cat([self.ids, self.ids.new_full((top - len(self.ids),), -1)])  # (slots,)
        self.ids[slots] = ids[: len(slots)]
        first = lengths - starts.diff()  # (R,): position of each request's first token
        places = first[:, None] + torch.arange(-self.reach, 1, device="cpu")  # (R, N)
        blocks = table.gather(1, places.clamp(min=0) // self.block_size)  # (R, N)
        seen = blocks * self.block_size + places.clamp(min=0) % self.block_size  # (R, N)
        if not torch.equal(seen[:, -1], slots[starts[:-1]]):
            raise RuntimeError(
                f"vLLM's KV cache is not laid out in blocks of {self.block_size}, so earlier tokens would not be "
                "found: use a version of vllm that docs/serving.md names."
            )
        known = self.ids[seen[:, :-1].clamp(max=len(self.ids) - 1)]  # (R, N - 1)
        return starts, torch.where(places[:, :-1] >= 0, known, -1)
