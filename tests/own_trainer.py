"""Two peers codistil in one process, with a training loop of one's own. docs/own_trainer.md explains it line by line."""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_codistill.core.codistiller import Codistiller
from fairseq_codistill.core.losses import pairwise
from fairseq_codistill.core.schedules import AlphaSchedule
from fairseq_codistill.core.topology import edges_of
from fairseq_codistill.exchange.exchange import Exchange
from fairseq_codistill.exchange.run import Run
from fairseq_codistill.exchange.stores import MemoryStore

PEERS, UPDATES, INTERVAL = 2, 200, 20
store = MemoryStore()  # where each peer is a job of its own: open_store("/shared/run")


class Peer:
    def __init__(self, index: int) -> None:
        torch.manual_seed(index)  # other initial weights, other batches
        self.model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)
        self.codistiller = Codistiller(
            index, PEERS, AlphaSchedule(alpha=0.3), Exchange(store, index), edges_of("all", PEERS), INTERVAL,
            in_background=False,
        )  # fmt: skip
        self.codistiller.join(Run(PEERS, None, None))
        self.codistiller.begin_epoch(1, self.model)

    def step(self, update: int, x: torch.Tensor, y: torch.Tensor) -> str:
        teaching = self.codistiller.teaching(update)  # exchanges first, when that is due
        logits = self.model(x)
        loss, told = F.cross_entropy(logits, y), "no teacher yet"
        if teaching is not None:
            predictions = (output for _, output in teaching.outputs({"input": x}))
            distance = pairwise("kl", logits, predictions).mean()
            loss, told = loss + teaching.alpha * distance, f"{distance:.4f} from a copy {teaching.staleness:.0f} updates old"
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return f"loss {loss:.3f}, {told}"


peers = [Peer(index) for index in range(PEERS)]
for update in range(UPDATES):
    for index, peer in enumerate(peers):
        x = torch.randn(32, 2)
        told = peer.step(update, x, (x.prod(-1) > 0).long())  # the sign of a product: not linear
        if (update + 1) % 50 == 0:
            print(f"update {update + 1}, peer {index}: {told}")
for peer in peers:
    peer.codistiller.end(completed=True)
