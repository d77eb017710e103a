"""verl on a CPU: what stands for vLLM here, and how a tool is called.

Imported by verl in each of its processes, see run.sh, and known to it through its registries. Not
for use: it samples one response at a time.
"""

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

RESPONSE_TOKENS = 12  # of each response, at most
SERVER = "cpu_server"


# ------------------------------------------------------------------------------ in place of vLLM
@ray.remote
class Server:
    """Samples responses, one at a time."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.global_steps = 0

    @torch.no_grad()
    def generate(self, request_id, prompt_ids, sampling_params, **kwargs):
        inputs = torch.tensor([prompt_ids])
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=RESPONSE_TOKENS,
            do_sample=True,
            temperature=sampling_params["temperature"],
            top_k=0,
        )
        ids = output[0, len(prompt_ids) :].tolist()
        version = {"global_steps": self.global_steps}
        return TokenOutput(token_ids=ids, stop_reason="completed", extra_fields=version)

    def update(self, weights, global_steps):
        self.model.load_state_dict(weights, strict=False)  # not strict: the head is the embedding
        self.global_steps = global_steps or 0

    def wake_up(self, **kwargs):
        pass

    def sleep(self):
        pass


class Replica(RolloutReplica):
    """Starts the server."""

    async def launch_servers(self):
        self._server_handle = Server.options(name=SERVER).remote(self.model_config.path)
        self._server_address = "cpu"
        self.servers = [self._server_handle]


class Rollout(base.BaseRollout):
    """The training worker's end of it: hands new weights to the server."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **kwargs):
        weights = {name: weight.detach().clone() for name, weight in weights}
        await ray.get_actor(SERVER).update.remote(weights, global_steps)


RolloutReplicaRegistry.register("cpu", lambda: Replica)
base._ROLLOUT_REGISTRY["cpu", "async"] = "bench.Rollout"


# ------------------------------------------------------------------------------ tool calls
@ToolParser.register("command")
class CommandParser(ToolParser):
    """A response that goes somewhere is a call of the tool; any other ends the episode."""

    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        if "go" not in text:
            return text, []
        return text, [FunctionCall(name="walk", arguments='{"steps": 1}')]
