"""The equations of the losses in float64 numpy, one position at a time.

They are independent of the package: nothing here is fast, batched or shared with it.
"""

import itertools
import math

import numpy as np


def log_softmax(logits, vocab_size=None):
    logits = np.array(logits, np.float64)
    if vocab_size is not None:
        logits = logits[:vocab_size]
    largest = logits.max()
    return logits - largest - np.log(np.sum(np.exp(logits - largest)))


def positions(function, *arrays):
    """A list of the results of `function` at every position (all axes but the last)."""
    leading = np.shape(arrays[0])[:-1]
    return [function(*(a[index] for a in arrays)) for index in np.ndindex(leading)]


def cross_entropy(logits, labels, vocab_size=None):
    out = np.zeros(np.shape(labels))
    for index in np.ndindex(out.shape):
        out[index] = -log_softmax(logits[index], vocab_size)[labels[index]]
    return out


def kl(log_p, log_q):
    return sum(
        math.exp(a) * (a - b)
        for a, b in zip(log_p, log_q, strict=True)
        if math.exp(a) > 0
    )


def divergence(
    equation, student, teacher, *numbers, held=None, temperature=1.0, vocab_size=None
):
    """`equation(log_p, log_q, *numbers)` at every position; p is the teacher's.

    `held` is the student without gradient, for equations that stop one: it stays the
    same while `student` is moved for a numerical derivative.
    """

    def at(*logits):
        log_q, log_p, *rest = (
            log_softmax(np.asarray(x, np.float64) / temperature, vocab_size)
            for x in logits
        )
        return equation(log_p, log_q, *numbers, *rest)

    arrays = [x for x in (student, teacher, held) if x is not None]
    return np.reshape(positions(at, *arrays), np.shape(student)[:-1])


def forward_kl(student, teacher, temperature=1.0, vocab_size=None):
    return divergence(
        kl, student, teacher, temperature=temperature, vocab_size=vocab_size
    )


def reverse_kl(log_p, log_q):
    return kl(log_q, log_p)


def symmetric_kl(log_p, log_q):
    return (kl(log_p, log_q) + kl(log_q, log_p)) / 2


def total_variation(log_p, log_q):
    return np.sum(np.abs(np.exp(log_p) - np.exp(log_q))) / 2


def log_mixture(weight, log_a, log_b):
    """log(weight a + (1 - weight) b) per class."""

    def of_class(a, b):
        parts = [(weight, a), (1 - weight, b)]
        logs = [math.log(w) + x for w, x in parts if w > 0 and x > -np.inf]
        if not logs:
            return -np.inf
        return max(logs) + math.log(sum(math.exp(x - max(logs)) for x in logs))

    return np.array([of_class(a, b) for a, b in zip(log_a, log_b, strict=True)])


def jensen_shannon(log_p, log_q, beta):
    log_m = log_mixture(beta, log_p, log_q)
    parts = [(beta, log_p), (1 - beta, log_q)]
    return sum(weight * kl(x, log_m) for weight, x in parts if weight > 0)


def skewed_forward_kl(log_p, log_q, alpha):
    return kl(log_p, log_mixture(alpha, log_p, log_q))


def skewed_reverse_kl(log_p, log_q, alpha):
    return kl(log_q, log_mixture(1 - alpha, log_p, log_q))


def head(log_p, head_mass):
    """Mask of the head by a sort; it includes classes that tie with its last one."""
    p = np.exp(log_p)
    mass, least = 0.0, np.inf
    for x in np.sort(p)[::-1]:
        if mass >= head_mass:
            break
        mass, least = mass + x, x
    return p >= least


def adaptive_kl(log_p, log_q, head_mass, log_held=None):
    gap = np.abs(np.exp(log_p) - np.exp(log_q if log_held is None else log_held))
    in_head = head(log_p, head_mass)
    g_head, g_tail = sum(gap[in_head]), sum(gap[~in_head])
    if g_head + g_tail == 0:
        return symmetric_kl(log_p, log_q)
    parts = [(g_head, kl(log_p, log_q)), (g_tail, kl(log_q, log_p))]
    return sum(g * value for g, value in parts if g > 0) / (g_head + g_tail)


def alpha_beta(log_p, log_q, a, b):
    p, q, s = np.exp(log_p), np.exp(log_q), a + b
    terms = p**a * q**b - a / s * p**s - b / s * q**s
    return -np.sum(terms) / (a * b)


def taid(log_p, log_q, mix, log_held=None):
    parts = [(1 - mix, log_q if log_held is None else log_held), (mix, log_p)]
    return kl(log_softmax(sum(w * x for w, x in parts if w > 0)), log_q)


def entropy(log_p):
    return -sum(math.exp(a) * a for a in log_p if math.exp(a) > 0)


def entropy_gated_kl(log_p, log_q, threshold):
    forward = kl(log_p, log_q) if entropy(log_p) > threshold else 0.0
    return kl(log_q, log_p) + forward


def per_class_kl(log_p, log_q, log_held=None):
    """Both KLs of each class, with the weights that `log_held` gives."""
    log_held = log_q if log_held is None else log_held
    total = 0.0
    for p, q, held in zip(log_p, log_q, log_held, strict=True):
        if max(p, held) == -np.inf:
            continue
        share = math.exp(p - np.logaddexp(p, held))
        total += share * math.exp(p) * (p - q) + (1 - share) * math.exp(q) * (q - p)
    return total


def logit_difference(log_p, log_q, alpha, log_held=None):
    """The sum over all pairs of classes, pair by pair."""
    log_held = log_q if log_held is None else log_held
    w = alpha * np.exp(log_p) + (1 - alpha) * np.exp(log_held)
    some = np.flatnonzero(w)
    d = log_q[some] - log_p[some]
    pairs = itertools.product(zip(w[some], d, strict=True), repeat=2)
    return sum(a * b * (x - y) ** 2 for (a, x), (b, y) in pairs) / 4


def reverse_kl_top_k(log_p, log_q, k, support):
    """A sort finds the classes; those that equal the last of the K are listed too."""
    sides = [log_q] if support == "student" else [log_q, log_p]
    listed = np.any([x >= np.sort(x)[-k] for x in sides], axis=0)
    p, q = (
        np.append(x[listed], np.logaddexp.reduce(x[~listed], initial=-np.inf))
        for x in (log_p, log_q)
    )
    return kl(q, p)


def sampled_reverse_kl(log_p, log_q, token, baseline, log_held):
    """A function of log q with the gradient of the estimate at `log_held`."""
    advantage = log_held[token] - log_p[token] - baseline * kl(log_held, log_p)
    return advantage * log_q[token]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def gelu(x):
    return np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def candidates(student, teacher, num_candidates, vocab_size):
    """log p, log q, mean q of equals, quantile level, "is a target", of each of the K.

    Sums over all classes, class by class, with no order but in the choice of the K.
    """
    z = np.asarray(teacher, np.float64)[:vocab_size]
    log_p, log_q = log_softmax(teacher, vocab_size), log_softmax(student, vocab_size)
    order = np.argsort(-z, kind="stable")[:num_candidates]
    log_rest = logsumexp(log_p[z < z.max()])
    out = []
    for k in order:
        equals = z == z[k]
        is_cut = np.sum(equals) > np.sum(equals[order])
        log_q_k = np.mean(log_q[equals]) if is_cut else log_q[k]
        mean = math.exp(log_q_k) if is_cut else np.mean(np.exp(log_q[equals]))
        level = 0.0  # of a target, whose weight is 1 anyway
        if z[k] < z.max() and log_rest > -np.inf:
            level = np.sum(np.exp(log_p[z < z[k]] - log_rest))
            level += np.sum(np.exp(log_p[equals] - log_rest)) / 2
        out.append((log_p[k], log_q_k, mean, level, z[k] == z.max()))
    return tuple(np.array(column) for column in zip(*out, strict=True))


def logsumexp(x):
    if not np.any(x > -np.inf):
        return -np.inf
    return x.max() + np.log(np.sum(np.exp(x - x.max())))


def limits(clip_params, p, q):
    """f_sub(z): the limits that the clip network predicts."""
    layers = {
        name: {k: np.asarray(v, np.float64) for k, v in layer.items()}
        for name, layer in clip_params.items()
    }
    network_k = layers["hidden"]["kernel"].shape[0] // 2
    z = np.concatenate([p, q])
    z = z / np.sqrt(np.mean(z**2))
    k = len(p)
    padded = np.zeros(2 * network_k)
    padded[:k], padded[network_k : network_k + k] = z[:k], z[k:]
    hidden = gelu(padded @ layers["hidden"]["kernel"] + layers["hidden"]["bias"])
    a, b = hidden @ layers["output"]["kernel"] + layers["output"]["bias"]
    return 0.5 * sigmoid(a), 1 - 0.5 * sigmoid(b)


def log_mask(log_p, level, is_target, lower, upper, width):
    """log w; a probability that is 0 in float32 has weight 0."""
    log_w = np.full(len(log_p), -np.inf)
    for k in range(len(log_p)):
        if is_target[k]:
            log_w[k] = 0.0
        elif log_p[k] > math.log(np.finfo(np.float32).tiny):
            log_w[k] = log_sigmoid((level[k] - lower) / width)
            log_w[k] += log_sigmoid((upper - level[k]) / width)
    return log_w


def weighted_ratio(log_w, log_a, log_b):
    """sum w (log a - log b) over the classes with w > 0."""
    return sum(
        math.exp(w) * (a - b)
        for w, a, b in zip(log_w, log_a, log_b, strict=True)
        if math.exp(w) > 0
    )


def dac_kl(
    clip_params,
    student,
    teacher,
    *,
    fixed=None,
    num_candidates=None,
    vocab_size=None,
    width=0.01,
    normalization="teacher",
    signal=("prior", 10.0),
    by_network=False,
):
    """The six fields of DacKl; `fixed` = (lower, upper) replaces the network.

    `by_network` gives the function whose gradient the clip network gets, where that is
    not the loss.
    """
    if num_candidates is None:
        num_candidates = np.shape(clip_params["hidden"]["kernel"])[0] // 2

    def at(s, t):
        log_p, log_q, q_mean, level, is_target = candidates(
            s, t, num_candidates, vocab_size
        )
        lower, upper = fixed or limits(clip_params, np.exp(log_p), q_mean)
        log_w = log_mask(log_p, level, is_target, lower, upper, width)
        log_wp = log_w + log_p
        p_hat = log_wp - logsumexp(log_wp)
        unnormalised = weighted_ratio(log_wp, log_p, log_q)
        loss = weighted_ratio(p_hat, p_hat, log_q)
        name, *weight = signal
        if normalization == "none" or (name == "unnormalised" and by_network):
            loss = unnormalised
        if fixed is None and name == "prior":
            loss += weight[0] * ((lower - 0.1) ** 2 + (upper - 0.98) ** 2)
        if fixed is None and name == "fidelity":
            loss += weight[0] * weighted_ratio(p_hat, p_hat, log_p)
        sums = (np.sum(np.exp(x)) for x in (log_wp, log_w, log_p))
        return loss, lower, upper, *sums

    leading = np.shape(student)[:-1]
    return [
        np.reshape(field, leading)
        for field in zip(*positions(at, student, teacher), strict=True)
    ]


def span_correlation(student, teacher, span_ids, where=None, vocab_size=None):
    """One sequence: [T, V] logits, [T] ids."""
    length = len(span_ids)
    where = [True] * length if where is None else where
    out = np.zeros(length)
    for t in range(length - 1):
        paired = span_ids[t] == span_ids[t + 1] and span_ids[t] != -1
        if paired and where[t] and where[t + 1]:
            q, q_next, p, p_next = (
                np.exp(log_softmax(x[i], vocab_size))
                for x in (student, teacher)
                for i in (t, t + 1)
            )
            out[t] = math.sqrt(sum((p * p_next - q * q_next) ** 2))
    return out


def numeric_gradient(function, x, step=1e-5):
    """Central differences of a scalar function of one float64 array."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        if not np.isfinite(x[index]):
            continue
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient
