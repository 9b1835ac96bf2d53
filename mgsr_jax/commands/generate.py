"""`mgsr generate`: sample or decode responses to prompts."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import (
    Dtype,
    LoadedModel,
    check_sampling,
    load,
    make_mesh,
)
from mgsr_jax.commands.prompts import (
    Request,
    encode_request,
    read_requests,
)
from mgsr_jax.sharding import MeshConfig
from mgsr_jax.training.distributed import (
    DistributedConfig,
    check_equal,
    is_lead,
    on_all_processes,
    start,
)

if TYPE_CHECKING:
    from mgsr_jax.data.encoding import Encoding
    from mgsr_jax.data.prompts import Prompt
    from mgsr_jax.rows import Rows


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Settings of generate.

    Attributes:
      model: folder of a Hugging Face checkpoint, or its hub name (org/name, or
        org/name@revision).
      prompt: an instruction, or a list of instructions in brackets.
      file: file of prompts: a data file in any form of data.train (.jsonl, .json or
        .parquet), whose responses are not read. In any other file, and on standard
        input (-), a line is a prompt. Without prompt and file, standard input is read.
      columns: the data's names of columns that it names differently, such as
        {prompt: query}.
      input: context that is added to each instruction (the field `input` of Alpaca).
      template: "chat" for the tokenizer's chat template, the path of a template file
        (.jinja), "alpaca", "none" for the plain text, or "auto": chat where the
        tokenizer has a template, otherwise alpaca.
      template_args: further variables of the chat template, such as
        {enable_thinking: false}.
      system: text of a system message for prompts without one.
      add_special_tokens: whether the tokenizer adds its special tokens (such as bos)
        to a prompt.
      max_length: longest prompt and response in tokens.
      temperature: sampling temperature; 0 decodes greedily.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the fewest most probable tokens whose mass reaches top_p.
      seed: seed of sampling.
      batch_size: prompts decoded at a time.
      dtype: precision of weights and cache.
      mesh: devices that share the work; by default one device. Responses do not depend
        on it.
      distributed: how several processes find each other without a launcher.
    """

    model: str
    prompt: str | list[str] | None = None
    file: str | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    input: str = ""
    template: str = "auto"
    template_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    add_special_tokens: bool = True
    max_length: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 10
    batch_size: int = 32
    dtype: Dtype = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    distributed: DistributedConfig = dataclasses.field(
        default_factory=DistributedConfig
    )


def generate(config: GenerateConfig) -> int:
    """Print one JSON object a line for each prompt, with the model's response.

    Its keys are prompt (the rendered text), response, length (tokens of the response
    without the stop token) and finish_reason: "stop" after a token that ends a
    response, "length" at max_length.
    """
    check_sampling(
        config.temperature,
        config.top_k,
        config.top_p,
        max_length=config.max_length,
        batch_size=config.batch_size,
    )
    requests = read_requests(config.prompt, config.file, config.input, config.columns)
    start(config.distributed)
    loaded = load(config.model, _encoding(config), mesh=make_mesh(config.mesh))
    prompts = on_all_processes(
        lambda: [_prompt(config, loaded, i, r) for i, r in enumerate(requests)]
    )
    check_equal({"prompt": json.dumps([prompt.tokens for prompt in prompts])})
    if is_lead():
        print(*loaded.encoder.notes, sep="\n", file=sys.stderr)
    for rows in _responses(config, loaded, prompts):
        if is_lead():
            _print_lines(loaded, prompts, rows)
    return DONE


def _encoding(config: GenerateConfig) -> "Encoding":
    from mgsr_jax.data.encoding import Encoding

    return Encoding(
        config.template,
        config.add_special_tokens,
        template_args=config.template_args,
        system=config.system,
    )


def _prompt(
    config: GenerateConfig, loaded: LoadedModel, index: int, request: Request
) -> "Prompt":
    from mgsr_jax.data.prompts import Prompt

    ids = encode_request(loaded.encoder, request)
    if len(ids) >= config.max_length:
        raise ValueError(
            f"{request.source}: a prompt of {len(ids)} tokens leaves no room for a "
            f"response in max_length={config.max_length}; raise max_length"
        )
    return Prompt(tuple(ids), (), (), index, True, request.source)


def _responses(
    config: GenerateConfig, loaded: LoadedModel, prompts: list["Prompt"]
) -> Iterator["Rows"]:
    """Rows of each batch in the prompts' order, on every host."""
    import contextlib

    import jax
    import jax.numpy as jnp

    from mgsr_jax import sharding
    from mgsr_jax.decoding.sampling import Sampling
    from mgsr_jax.evaluation.responses import EvaluationConfig, sample_responses

    mesh = loaded.mesh
    parts = 1 if mesh is None else sharding.row_parts(mesh)
    size = min(config.batch_size, -(-len(prompts) // parts) * parts)
    protocol = EvaluationConfig(
        sampling=Sampling(config.temperature, config.top_k, config.top_p),
        max_prompt_length=max(len(prompt.tokens) for prompt in prompts),
        max_length=config.max_length,
        batch_size=size,
        dtype=jnp.dtype(config.dtype),
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for rows in sample_responses(
            loaded.model,
            loaded.params(config.dtype),
            prompts,
            protocol,
            decoding=protocol.decoding(loaded.eos_ids(), len(loaded.tokenizer)),
            seed=config.seed,
            mesh=mesh,
        ):
            yield sharding.fetch_whole(rows)


def _print_lines(loaded: LoadedModel, prompts: list["Prompt"], rows: "Rows") -> None:
    from mgsr_jax.evaluation.responses import prompt_text, read_responses

    for example, response in read_responses(rows, loaded.eos_ids()).items():
        line = {
            "prompt": prompt_text(loaded.tokenizer, prompts[example]),
            "response": loaded.text(response.tokens),
            "length": len(response.tokens),
            "finish_reason": response.finish_reason,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
