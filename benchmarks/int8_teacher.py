"""What int8 does to a teacher: KL from its float32 self, and the most probable tokens.

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a Hugging Face checkpoint")
    parser.add_argument("data", help="instruction data")
    args = parser.parse_args()
    model, tokenizer = models.from_config(args.folder), hf.load_tokenizer(args.folder)
    texts = [
        tokenizer(f"{found.instruction}\n{found.references[0]}")["input_ids"]
        for found in itertools.islice(records.read_examples(args.data), RECORDS)
        if isinstance(found, records.Example)
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
    before = all_logits(FORMS["float32"])
    for name, form in FORMS.items():
        kl, same = [], []
        for row, (old, new) in enumerate(zip(before, all_logits(form), strict=True)):
            kl.append(np.asarray(losses.forward_kl(new, old))[real[row]])
            same.append((new.argmax(-1) == old.argmax(-1))[real[row]])
        mean, kept = np.concatenate(kl).mean(), np.concatenate(same).mean()
        print(f"{name}: KL {mean:.5f} nats a token, {kept:.1%} of the top tokens stay")


if __name__ == "__main__":
    main()
