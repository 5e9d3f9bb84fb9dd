"""Recall at distance, as a module of evaluate: evaluate.load("eval/metrics/recall_at_distance")."""

from bisect import bisect_left
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """
How often a model gives the right token, by how many tokens ago it was shown: the forgetting curve of the synthetic
tasks in hf_gallery.data.
"""

_INPUTS = """
Args:
    predictions: rows of token ids, the model's first choice for every column.
    references: rows of token ids, what the column is to be; -100 where it is not scored.
    distances: rows of numbers, how many tokens before a scored column its answer was shown.
    edges: distances to put together, in rising order: all that reach no further than the first, and so on. Those
        beyond the last are left out of the curve. Each distance by itself where none are given.

Returns:
    recall: the share of the right among all scored columns.
    recall@D, asked@D: the share and the number of scored columns for each distance or edge D that there is.

Raises ValueError where nothing is scored, and for edges that do not rise.

Examples:
    >>> metric = evaluate.load("eval/metrics/recall_at_distance")
    >>> metric.compute(predictions=[[7, 8, 9]], references=[[7, 5, -100]], distances=[[4, 16, -1]])
    {'recall': 0.5, 'recall@4': 1.0, 'asked@4': 1, 'recall@16': 0.0, 'asked@16': 1}

    In a Trainer, whose logits become the model's choices while they are on the device; test is a data set of
    hf_gallery.data:

    >>> def keep_choices(logits, labels):
    ...     return logits.argmax(-1)
    >>> def compute_metrics(p):  # what column t - 1 predicts is scored in column t
    ...     return metric.compute(
    ...         predictions=p.predictions[:, :-1],
    ...         references=p.label_ids[:, 1:],
    ...         distances=np.array(test["distance"])[:, 1:],
    ...     )
    >>> Trainer(..., eval_dataset=test, preprocess_logits_for_metrics=keep_choices, compute_metrics=compute_metrics)
"""

_CITATION = """
@article{arora2023zoology,
  title={Zoology: Measuring and Improving Recall in Efficient Language Models},
  author={Arora, Simran and Eyuboglu, Sabri and Timalsina, Aman and Johnson, Isys and Poli, Michael and Zou, James and
          Rudra, Atri and R{\\'e}, Christopher},
  journal={arXiv preprint arXiv:2312.04927},
  year={2023}
}
"""


class RecallAtDistance(evaluate.Metric):
    """Accuracy by distance; Arora et al. 2023 (Zoology) measure recall by the gap to what is recalled."""

    def _info(self):
        rows = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows, "distances": rows}),
            reference_urls=["https://arxiv.org/abs/2312.04927"],
        )

    def _compute(self, predictions, references, distances, edges=None):
        if edges is not None and list(edges) != sorted(set(edges)):
            raise ValueError(f"edges are {list(edges)}; they must rise")
        asked, right = Counter(), Counter()
        for columns in zip(predictions, references, distances, strict=True):
            for said, wanted, distance in zip(*columns, strict=True):
                if wanted == -100:
                    continue
                if edges is not None:
                    place = bisect_left(edges, distance)
                    distance = edges[place] if place < len(edges) else None
                asked[distance] += 1
                right[distance] += said == wanted
        if not asked:
            raise ValueError("references hold nothing but -100; give at least one scored column")
        found = {"recall": right.total() / asked.total()}
        for distance in sorted(d for d in asked if d is not None):
            found[f"recall@{distance}"] = right[distance] / asked[distance]
            found[f"asked@{distance}"] = asked[distance]
        return found
