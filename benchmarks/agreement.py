"""What gradients with respect to the features say of those of the parameters.

    python benchmarks/agreement.py --write                    writes benchmarks/agreement.md

`gradient_cosine`, `ol_aux` and the methods on gene blocks look at gradients with respect to the features, because those
of 15,000 genes cost what those of one do. The literature means the shared parameters. How far does it matter? `agl` is
trained on the planted tissue of benchmarks/planted.py; in some epochs every batch is asked for the inner products of
each auxiliary gene's gradient with that of the mean primary loss, with respect to the features, to the late part of the
backbone and to all of it.

Columns: the share of auxiliary genes whose product has the sign of that with all parameters, and the correlation of the
products over these genes, means over batches and seeds. `next batch` compares the products with all parameters of one
batch with those of the next: what of them is the gene's, and not the batch's. Chance is a share of about one half
(more, where most products have the same sign) and a correlation of zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import measure
import planted
import torch
from torch import Tensor

from agl_bench import Selector, Step
from agl_bench.bench.run import Bench
from agl_bench.bench.spec import Campaign
from agl_bench.registry.plugins import Plugins
from agl_bench.training.trainer import Trainer

WITHIN = ("features", "late", "all")
QUICK = {
    "set": ["protocol.epochs=2", "synthetic.spots=60", "tiny.channels=4", "protocol.batch_size=32"],
    "seeds": 1,
    "regimes": "helpful",
    "epochs": [0, 1],
    "write": False,
}


class Watch:
    """Asks the training steps of some epochs for their products."""

    def __init__(self, selector: Selector, epochs: Sequence[int]) -> None:
        self.selector, self.epochs = selector, epochs
        self.seen: list[tuple[int, dict[str, Tensor]]] = []  # epoch, products of the auxiliary genes
        selector.observe = self.observe  # type: ignore[method-assign]

    def observe(self, losses: Tensor, step: Step) -> None:
        """Of one training step."""
        if step.epoch in self.epochs:
            toward = losses[self.selector.is_primary].mean()
            products = {w: step.alignment(losses, toward, w)[~self.selector.is_primary] for w in WITHIN}  # type: ignore[arg-type]
            self.seen.append((step.epoch, products))

    def rows(self) -> list[measure.Row]:
        """One for each batch and comparison."""
        found = []
        for (epoch, here), (after, there) in zip(self.seen, [*self.seen[1:], (-1, {})], strict=True):
            pairs = {w: here[w] for w in WITHIN[:-1]} | ({"next batch": there["all"]} if after == epoch else {})
            found += [{"epoch": epoch, "compared": n, **alike(p, here["all"])} for n, p in pairs.items()]
        return found


def alike(one: Tensor, other: Tensor) -> dict[str, float]:
    """Share of equal signs, and correlation."""
    both = torch.stack([one, other]).double()
    return {"sign": float((one.sign() == other.sign()).double().mean()), "correlation": float(both.corrcoef()[0, 1])}


def watched(regime: str, seed: int, epochs: Sequence[int], settings: Sequence[str]) -> list[measure.Row]:
    """One training of `agl`."""
    plugins = Plugins.discover()
    bench = Bench(plugins, planted.NOWHERE, torch.device("cpu"))
    given = [f"{k}={v}" for k, v in planted.SETTINGS.items()]
    campaign = Campaign.of(
        plugins,
        selectors=["agl"],
        datasets=["synthetic"],
        evaluation=["inter"],
        fold=[planted.TESTED[1]],
        seeds=[str(seed)],
        assignments=[*given, *settings, f"synthetic.regime={regime}", f"synthetic.data_seed={seed}"],
    )
    ((spec, plan),) = campaign.cells(plugins, planted.NOWHERE, device="cpu", fingerprint={})
    setting = bench.setting(spec, plan)
    model, selector = bench.build(spec, setting)
    watch = Watch(selector, epochs)
    for record in Trainer(
        model, selector, setting.development, setting.rows, setting.genes, spec.protocol, seed=spec.seed
    ):
        if record.epoch >= max(epochs):
            break
    return [{"regime": regime, "seed": seed} | row for row in watch.rows()]


def table(rows: Sequence[measure.Row]) -> list[measure.Row]:
    """Means, one row for each regime, comparison and epoch."""
    found = []
    for key in dict.fromkeys((r["regime"], r["compared"], r["epoch"]) for r in rows):
        here = [r for r in rows if (r["regime"], r["compared"], r["epoch"]) == key]
        means = {n: f"{statistics.fmean(r[n] for r in here):.2f}" for n in ("sign", "correlation")}
        found.append(dict(zip(("regime", "compared with all", "epoch"), key, strict=True)) | means)
    return sorted(found, key=lambda row: (row["regime"], str(row["compared with all"])))


def main() -> None:
    """See the module."""
    made = measure.parser(__doc__)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--regimes", default=",".join(planted.REGIMES))
    made.add_argument("--epochs", nargs="+", type=int, default=[0, 5, 20])
    made.add_argument("--set", nargs="+", default=[], metavar="NAME.KEY=VALUE", help="as of agl-bench run")
    made.add_argument("--write", action="store_true", help="write benchmarks/agreement.md")
    options = measure.options(made, quick=QUICK)
    rows = [
        row
        for regime in options.regimes.split(",")
        for seed in range(options.seeds)
        for row in watched(regime, seed, options.epochs, options.set)
    ]
    here = measure.machine(options.device)
    text = "\n\n".join(
        [
            "# Agreement of gradients",
            "`python benchmarks/agreement.py --write`",
            (__doc__ or "").partition("\n\n    ")[2].partition("\n\n")[2].strip(),
            f"{here['processor']}, {here['threads']} threads, device {here['device']}, torch {here['torch']}, commit "
            f"{here['commit'] or 'unknown'}: {options.seeds} seeds of planted tissue.",
            measure.table(table(rows), markdown=True),
        ]
    )
    measure.publish("agreement", text, rows, options)


if __name__ == "__main__":
    main()
