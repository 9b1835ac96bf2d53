"""MGSR's three means of one batch in float64 numpy, one position at a time."""

import numpy as np
from losses import reference


def mgsr_means(clip_params, student, teacher, labels, scored, span_ids=None, **dac):
    """What is trained and logged, by name.

    `labels[b, t]` is what logits at t predict, `scored` and `span_ids` likewise.
    """
    fields = "dac_kl lower upper kept_mass kept_classes candidate_mass".split()
    values = reference.dac_kl(clip_params, student, teacher, **dac)
    scored = np.asarray(scored, bool)
    means = {name: np.mean(x[scored]) for name, x in zip(fields, values, strict=True)}
    vocab_size = dac.get("vocab_size")
    means["sft"] = np.mean(reference.cross_entropy(student, labels, vocab_size)[scored])
    if span_ids is not None:
        distances = [
            reference.span_correlation(*row, vocab_size)
            for row in zip(student, teacher, span_ids, scored, strict=True)
        ]
        pairs = [
            [
                a == b != -1 and x and y
                for a, b, x, y in zip(ids, ids[1:], where, where[1:], strict=False)
            ]
            for ids, where in zip(span_ids, scored, strict=True)
        ]
        means["span"] = np.sum(distances) / max(np.sum(pairs), 1)
    return means
