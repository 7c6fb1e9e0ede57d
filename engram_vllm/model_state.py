"""EngramModelState: the ids before a request's first scheduled token, in vLLM's model runner V2.

Promises: V2 holds the prompt's and the generated ids of every request, so chunked prefill, prefix-cache hits,
preemption and any order of requests are the same look-up. Never keeps state of a request.
Source: vLLM 0.32, `vllm/v1/worker/gpu/model_states`.
"""

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class EngramModelState(DefaultModelState):
    """The state of model runner V2, which also hands over look-back ids."""

    supports_prompt_embeds = False

    def prepare_inputs(self, input_batch, req_states) -> dict:
        inputs = super().prepare_inputs(input_batch, req_states)
        count = input_batch.num_reqs
        request = input_batch.idx_mapping[:count].long()  # (R,)
        first = req_states.num_computed_tokens.gpu[request].long()  # (R,)
        places = first[:, None] + torch.arange(-self.model.memory.reach, 0, device=first.device)  # (R, N - 1)
        ids = req_states.all_token_ids.gpu[request[:, None], places.clamp(min=0)].long()  # (R, N - 1)
        before = torch.where(places >= 0, ids, -1)
        return {**inputs, "engram_history": (input_batch.query_start_loc[: count + 1].long(), before)}
