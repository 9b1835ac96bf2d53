"""Compare an int8 teacher with its float32 form: KL, and the share of equal top tokens.

python benchmarks/int8_teacher.py FOLDER DATA.jsonl
"""

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgsr_jax import losses, models
from mgsr_jax.checkpoint import hf
from mgsr_jax.data import records
from mgsr_jax.models import quantized

LONGEST, SHORTEST, RECORDS = 128, 64, 64
FORMS = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "int8": {"dtype": jnp.bfloat16, "transform": quantized.quantize},
}


def main() -> None:
    """Print one line for each form of the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a Hugging Face checkpoint")
    parser.add_argument("data", help="instruction data")
    args = parser.parse_args()
    model, tokenizer = models.from_config(args.folder), hf.load_tokenizer(args.folder)
    texts = [
        tokenizer(f"{record.instruction}\n{record.references[0]}")["input_ids"]
        for record in itertools.islice(records.read_examples(args.data), RECORDS)
        if isinstance(record, records.Example)
    ]
    rows = [ids[:LONGEST] for ids in texts if len(ids) >= SHORTEST]
    tokens = np.array([ids + [0] * (LONGEST - len(ids)) for ids in rows], np.int32)
    real = np.arange(LONGEST) < np.array([[len(ids)] for ids in rows])

    @jax.jit
    def logits(params: Any, tokens: Any) -> Any:
        hidden, _ = model.forward(params, tokens[None])
        return model.unembed(model.head_params(params), hidden)[0]

    def all_logits(form: Any) -> list[np.ndarray]:
        params = hf.load_params(args.folder, model, **form)
        return [np.asarray(logits(params, row)) for row in tokens]

    print(f"{real.sum()} tokens")
    exact_logits = all_logits(FORMS["float32"])
    for name, form in FORMS.items():
        kl, same = [], []
        for where, exact, rounded in zip(
            real, exact_logits, all_logits(form), strict=True
        ):
            kl.append(np.asarray(losses.forward_kl(rounded, exact))[where])
            same.append((rounded.argmax(-1) == exact.argmax(-1))[where])
        mean, kept = np.concatenate(kl).mean(), np.concatenate(same).mean()
        print(f"{name}: KL {mean:.5f} nats per token, {kept:.1%} of top tokens stay")


if __name__ == "__main__":
    main()
