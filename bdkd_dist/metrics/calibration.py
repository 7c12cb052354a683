"""Accuracy and calibration of one network as sums over samples."""

import math

import torch
from torch import Tensor

from bdkd_dist import distributed
from bdkd_dist.errors import UserError
from bdkd_dist.metrics import bootstrap, ranking
from bdkd_dist.metrics.bins import NUM_BINS, Reliability, bin_edges, brier_split
from bdkd_dist.metrics.inputs import check_shapes, count_outside, float64_chunks, outside


class CalibrationState:
    """Accuracy and calibration of one network as sums over samples.

    Confidence is the largest softmax probability at temperature 1; bins are (lo, hi], 0 falls in the first and 1 in
    the last. All is computed and summed in float64 from the logits, whatever their dtype and range. The predicted
    class is the first index of the largest logit (as ``torch.argmax``); top-5 breaks ties the same way.

    A sample with a NaN or infinite logit counts as wrong in ``top1`` and ``top5`` and makes every other figure nan.

    Adding up is exact for counts; float64 sums of different orders agree to about 1e-12.

    Args:
        num_classes: K, at least 2.
        num_bins: Bins of ECE, AdaECE, classwise ECE and MCE, at least 1.
        device: Where the logits will be; the sums are kept there.

    Raises:
        UserError: ``num_classes`` or ``num_bins`` is too small.
    """

    def __init__(self, num_classes: int, num_bins: int = NUM_BINS, device: torch.device | str = "cpu"):
        for name, value, least in (("num_classes", num_classes, 2), ("num_bins", num_bins, 1)):
            if value < least:
                raise UserError(f"{name}: {value}; allowed: {least} or more")
        self.num_classes = num_classes
        self.num_bins = num_bins
        with torch.inference_mode(False):  # a tensor born in inference mode could not be added to outside it
            self._inner_edges = torch.tensor(bin_edges(num_bins)[1:-1], dtype=torch.float64, device=device)
            self._first_bin = torch.arange(0, num_classes * num_bins, num_bins, device=device)
            self._classes = torch.arange(num_classes, device=device)
            self._sums = {
                "count": torch.zeros(2, dtype=torch.int64, device=device),  # samples, targets out of range
                "top": torch.zeros(2, dtype=torch.int64, device=device),  # top-1, top-5
                "scores": torch.zeros(3, dtype=torch.float64, device=device),  # NLL, Brier, entropy
                "bin_count": torch.zeros(num_bins, dtype=torch.int64, device=device),
                "bin_correct": torch.zeros(num_bins, dtype=torch.int64, device=device),
                "bin_confidence": torch.zeros(num_bins, dtype=torch.float64, device=device),
                # By class k and bin of p_k: samples, those of class k, and Σ(p_k - y_k).
                "class_count": torch.zeros(num_classes * num_bins, dtype=torch.int64, device=device),
                "class_hits": torch.zeros(num_classes * num_bins, dtype=torch.int64, device=device),
                "class_gap": torch.zeros(num_classes * num_bins, dtype=torch.float64, device=device),
            }
            # Order and resamples need the samples themselves: (confidence, correct, NLL, Brier), (4, b) a chunk.
            self._samples = [torch.zeros(4, 0, dtype=torch.float64, device=device)]

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch; nothing waits for the device.

        Args:
            logits: (B, K), any floating dtype, on the state's device; B may be 0.
            targets: (B,) int64 class indices. Those out of range are reported by :meth:`compute`.

        Raises:
            UserError: A shape, dtype or device differs from these.
        """
        self._check(logits, targets)
        self._sums["count"][0].add_(len(targets))
        self._sums["count"][1].add_(count_outside(targets, self.num_classes))
        for z, y in float64_chunks(logits, targets):
            self._add(z, y)

    def _add(self, z: Tensor, y: Tensor) -> None:
        """Add (b, K) float64 logits with their (b, 1) targets."""
        shifted = z - z.amax(1, keepdim=True)
        exponentials = shifted.exp()
        total = exponentials.sum(1, keepdim=True)
        probabilities = exponentials / total
        confidence = 1 / total[:, 0]  # the largest exponential is exp(0)
        log_total = total[:, 0].log()

        # Comparisons with NaN are false, so that a poisoned row has no class behind and ranks last.
        own = z.gather(1, y)
        behind = (z < own) | ((z == own) & (self._classes >= y))
        rank = self.num_classes - behind.sum(1)
        correct = rank < 1
        self._sums["top"] += torch.stack((correct.sum(), (rank < min(5, self.num_classes)).sum()))

        bins = self._bins(confidence)
        self._sums["bin_count"].scatter_add_(0, bins, torch.ones_like(bins))
        self._sums["bin_correct"].scatter_add_(0, bins, correct.long())
        self._sums["bin_confidence"].scatter_add_(0, bins, confidence)

        nll = log_total - shifted.gather(1, y)[:, 0]
        entropy = log_total - (probabilities * shifted).sum(1)
        class_bins = self._bins(probabilities) + self._first_bin
        residuals = probabilities.scatter_add_(1, y, torch.full_like(own, -1))  # p_k - y_k
        self._sums["class_count"].scatter_add_(0, class_bins.flatten(), torch.ones_like(class_bins).flatten())
        self._sums["class_hits"].scatter_add_(0, class_bins.gather(1, y)[:, 0], torch.ones_like(bins))
        self._sums["class_gap"].scatter_add_(0, class_bins.flatten(), residuals.flatten())
        brier = residuals.square().sum(1)
        self._sums["scores"] += torch.stack((nll.sum(), brier.sum(), entropy.sum()))
        self._samples.append(torch.stack((confidence, correct.double(), nll, brier)))

    def merge(self, other: "CalibrationState") -> None:
        """Add another state's samples to this one.

        Raises:
            UserError: The other state has other classes or bins.
        """
        if (self.num_classes, self.num_bins) != (other.num_classes, other.num_bins):
            raise UserError(
                f"state to merge: {other.num_classes} classes and {other.num_bins} bins; "
                f"allowed: {self.num_classes} and {self.num_bins}"
            )
        for name, values in self._sums.items():
            values += other._sums[name].to(values.device)
        self._samples.extend(part.to(self._first_bin.device) for part in list(other._samples))

    def all_reduce(self) -> None:
        """Make this the state of all ranks' samples, on every rank; without other ranks do nothing.

        A collective: every rank calls it, once, after its last update, however many samples it has, even none.
        """
        for values in self._sums.values():
            distributed.sum_(values)
        self._samples = [distributed.concatenate(torch.cat(self._samples, dim=1))]

    def compute(self) -> dict[str, float]:
        """Return the figures as fractions (NLL and entropy in nats); all but ``count`` are nan without samples.

        With n_b samples, accuracy acc_b and mean confidence conf_b in bin b of N samples:

        - ``top1``, ``top5``: fraction of samples whose target is the first class, among the min(5, K) first.
        - ``ece``: Σ_b n_b/N·|acc_b - conf_b| (Guo et al., 2017). ``mce``: the largest |acc_b - conf_b|.
        - ``adaece``: the ECE over bins of equal mass; see :func:`bdkd_dist.metrics.ranking.adaptive_error`.
        - ``classwise_ece``: mean over classes k of Σ_b n_b/N·|frequency of k - mean p_k| (Kull et al., 2019).
        - ``gap``: mean confidence - accuracy; positive is over-confident.
        - ``nll``; ``brier``: mean Σ_k (p_k - y_k)², in [0, 2] (Brier, 1950); ``entropy``: mean of the softmax's.
        - ``brier_reliability``, ``brier_resolution``, ``brier_uncertainty``: Murphy's split of ``brier`` over the bins
          of ``classwise_ece``, up to what remains within bins; see :func:`bdkd_dist.metrics.bins.brier_split`.
        - ``auroc``: of right against wrong predictions by confidence; nan where all are right or all wrong.
        - ``aurc``: the error rate among the k most confident samples, averaged over k; see
          :mod:`bdkd_dist.metrics.ranking` for both and for samples of equal confidence.

        Raises:
            UserError: Targets were out of range.
        """
        sums = self._on_host()
        count = int(sums["count"][0])
        total = count or math.nan
        bin_gap = sums["bin_confidence"] - sums["bin_correct"]
        filled = sums["bin_count"] > 0
        nll, brier, entropy = (sums["scores"] / total).tolist()
        members, hits, gaps = (sums[f"class_{name}"].view(self.num_classes, -1) for name in ("count", "hits", "gap"))
        split = brier_split(members, hits, gaps, total)
        # Two of the three see no residual: a poisoned sample must show in them too.
        reliability, resolution, uncertainty = (part + 0 * brier for part in split)
        size, correct, confidence = ranking.levels(*self._gathered()[:2])
        return {
            "top1": int(sums["top"][0]) / total,
            "top5": int(sums["top"][1]) / total,
            "ece": float(bin_gap.abs().sum()) / total,
            "adaece": float(ranking.adaptive_error(size, correct, confidence, self.num_bins)),
            "classwise_ece": float(sums["class_gap"].abs().sum()) / total / self.num_classes,
            "mce": float((bin_gap[filled] / sums["bin_count"][filled]).abs().amax()) if count else math.nan,
            "gap": float(bin_gap.sum()) / total,
            "nll": nll,
            "brier": brier,
            "brier_reliability": reliability,
            "brier_resolution": resolution,
            "brier_uncertainty": uncertainty,
            "entropy": entropy,
            "auroc": float(ranking.auroc(size, correct)),
            "aurc": float(ranking.aurc(size, correct)),
            "count": float(count),
        }

    def reliability(self) -> Reliability:
        """Return the equal-width bins behind ECE and MCE.

        Raises:
            UserError: Targets were out of range.
        """
        sums = self._on_host()
        return Reliability.of(sums["bin_count"], sums["bin_correct"], sums["bin_confidence"])

    def intervals(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals (low, high) of top1, nll, brier, ece, adaece, auroc and aurc.

        Percentile intervals: the quantiles (1 ± level)/2 of the figure over ``resamples`` draws of N samples with
        replacement. They speak of the samples' randomness alone, not of training's. A resample's ECE and AdaECE are
        biased upwards (drawing adds noise to every bin), so that their intervals may lie above a small figure.

        The draws depend on ``seed``, N and torch's version alone, and are laid on the samples sorted by confidence,
        correctness, NLL and Brier score to 2^-40: the same on every rank and for every order of samples and ranks, to
        about 1e-12. After :meth:`all_reduce` every rank can call it by itself; it is no collective.

        An interval is nan where the figure is; resamples without a right or a wrong prediction have no AUROC and are
        left out of its interval.

        Args:
            level: Coverage asked for, in (0, 1).
            resamples: Number of resamples, at least 1.
            seed: Seed of the draws.

        Raises:
            UserError: ``level`` or ``resamples`` is out of range, or targets were.
        """
        self._on_host()
        samples = self._gathered()
        bins = torch.bucketize(samples[0], self._inner_edges.cpu())
        return bootstrap.intervals(samples, bins, self.num_bins, level, resamples, seed)

    def _gathered(self) -> Tensor:
        """Return all samples on the CPU, (4, N)."""
        return torch.cat(self._samples, dim=1).cpu()

    def _bins(self, probabilities: Tensor) -> Tensor:
        """Return the index b of the bin (edge_b, edge_b+1] of each probability; NaN falls in the last."""
        return torch.bucketize(probabilities, self._inner_edges)

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        check_shapes(logits, targets, self.num_classes)
        if logits.device != self._first_bin.device:
            raise UserError(f"logits: on {logits.device}; allowed: the state's device, {self._first_bin.device}")

    def _on_host(self) -> dict[str, Tensor]:
        """Return the sums on the CPU, once it is sure that all targets were class indices."""
        sums = {name: values.cpu() for name, values in self._sums.items()}
        count, wrong = sums["count"].tolist()
        if wrong:
            raise outside(wrong, count, self.num_classes)
        return sums
