"""The distances again, slowly and obviously: plain Python over float64 lists, straight from the definitions."""

from __future__ import annotations

import math
from typing import List


def softmax(row: List[float], temperature: float) -> List[float]:
    powers = [math.exp((x - max(row)) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def kl_divergence(p: List[float], q: List[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def mse(own, peer, temperature):
    return sum((s - t) ** 2 for s, t in zip(own, peer)) / len(own)


def centered_mse(own, peer, temperature):
    own = [s - sum(own) / len(own) for s in own]
    peer = [t - sum(peer) / len(peer) for t in peer]
    return mse(own, peer, temperature)


def ce(own, peer, temperature):
    p, q = softmax(peer, temperature), softmax(own, temperature)
    return -sum(a * math.log(b) for a, b in zip(p, q)) * temperature**2


def kl(own, peer, temperature):
    return kl_divergence(softmax(peer, temperature), softmax(own, temperature)) * temperature**2


def reverse_kl(own, peer, temperature):
    return kl(peer, own, temperature)


def js(own, peer, temperature):
    p, q = softmax(own, temperature), softmax(peer, temperature)
    middle = [(a + b) / 2 for a, b in zip(p, q)]
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2 * temperature**2
