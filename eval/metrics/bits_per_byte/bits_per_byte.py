"""Bits per byte, as a module of evaluate: evaluate.load("eval/metrics/bits_per_byte")."""

import math

import datasets
import evaluate

_DESCRIPTION = """
How many bits a language model needs for a byte of text: minus the logarithm to base 2 of the probability that it gives
to the texts, over their bytes. Unlike perplexity it does not depend on the tokenizer. Less is better; 8 is what no
model at all takes.
"""

_INPUTS = """
Args:
    predictions: for each text, the logarithm to base e of its probability: the sum of its tokens' log-probabilities.
    references: for each text, the text itself, or how many bytes its scored tokens have in UTF-8.

Returns:
    bits_per_byte: over all texts together, so that long ones count more.
    bytes: how many there were.

Raises ValueError where there is no byte.

Examples:
    >>> metric = evaluate.load("eval/metrics/bits_per_byte")
    >>> metric.compute(predictions=[-4.1588830833596715], references=["abc"])
    {'bits_per_byte': 2.0, 'bytes': 3}

    In a Trainer, on byte tokens, whose logits are cut down to one number each while they are on the device:

    >>> def keep_scores(logits, labels):
    ...     scored = labels[:, 1:] >= 0
    ...     scores = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    ...     return scores * scored
    >>> def compute_metrics(p):
    ...     return metric.compute(predictions=p.predictions.sum(1), references=(p.label_ids[:, 1:] >= 0).sum(1))
    >>> Trainer(..., preprocess_logits_for_metrics=keep_scores, compute_metrics=compute_metrics)
"""

_CITATION = """
@article{gao2020pile,
  title={The {P}ile: An 800{GB} Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and Foster, Charles and
          Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and Leahy, Connor},
  journal={arXiv preprint arXiv:2101.00027},
  year={2020}
}
"""


class BitsPerByte(evaluate.Metric):
    """Bits per byte of texts; the Pile (Gao et al. 2020, section 3.1) reports language models by it."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value(kind)})
                for kind in ("string", "int64")
            ],
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions, references):
        count = sum(len(x.encode("utf-8")) if isinstance(x, str) else int(x) for x in references)
        if count < 1:
            raise ValueError(f"references hold {count} bytes in all; give at least one")
        return {"bits_per_byte": -math.fsum(predictions) / math.log(2) / count, "bytes": count}
