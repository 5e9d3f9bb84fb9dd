"""Documents packed one behind another in a row: where they begin, and the rows of their own that layers give them.

A trainer that pads nothing lays documents behind one another and says where they begin: by position_ids that start
again, by cu_seq_lens_q and cu_seq_lens_k (how many tokens end with each document), or by seq_idx (a number for each
document). A document computes what it computes alone. So each gets a row of its own, whose segments, blocks, memory
and state are its own, and the results go back to the columns where its tokens stand. Documents of like length make one
batch of rows, so that few columns are padding.

Letters: see spans.py. Of a shape (documents,) and (tokens,) is a number for each, of all rows in reading order.
"""

from __future__ import annotations

import torch

from .rows import DocumentRows, Rows

PACKING = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
MOST_PADDING = 1.5  # columns that a batch of documents may have for each of its tokens


class Documents:
    """The documents in the rows of an input, in reading order. Bookkeeping is on the CPU.

    rows: the input's rows as they stand. starts: (tokens,), True at the first token of each document; a row's first
    token is one. fresh: (B,), True where a row's first document begins anew, though the row has a past.
    """

    def __init__(self, rows: Rows, starts: torch.Tensor, fresh: torch.Tensor):
        self.batch, self.columns = rows.batch, rows.columns
        self.tokens = token_columns(rows)  # (tokens,) of [0, B * columns)
        self.of_token = starts.cumsum(0) - 1  # (tokens,) the document of each token
        self.first = starts.nonzero().squeeze(1)  # (documents,) the token that each begins with
        self.lengths = torch.bincount(self.of_token, minlength=len(self.first))  # (documents,)
        self.row = torch.div(self.tokens[self.first], self.columns, rounding_mode="floor")  # (documents,)
        self.leads = torch.ones_like(self.row, dtype=torch.bool)  # (documents,) the first document of its row
        self.leads[1:] = self.row[1:] != self.row[:-1]
        self.is_last = torch.ones_like(self.leads)  # (documents,) the last one
        self.is_last[:-1] = self.leads[1:]
        self.behind = rows.seen  # (B,) tokens behind each row
        self.seen = torch.where(
            self.leads & ~fresh[self.row], rows.seen[self.row], 0
        )  # (documents,) and each document
        self.are_rows = bool(self.leads.all()) and not bool((fresh & (rows.seen > 0)).any())

    def __len__(self):
        return len(self.first)

    @property
    def positions(self) -> torch.Tensor:
        """The place of each token in its document, (tokens,)."""
        return torch.arange(len(self.tokens)) - self.first[self.of_token] + self.seen[self.of_token]

    @property
    def longest(self) -> int:
        """Tokens that the longest document reaches, those behind it counted."""
        return int((self.seen + self.lengths).amax()) if len(self) else 0

    # ---- rows

    def rows(self, which: torch.Tensor) -> Rows:
        """A row for each document in `which` (any,), its numbers."""
        lengths = self.lengths[which]
        column = torch.minimum(torch.arange(int(lengths.amax())), lengths[:, None] - 1)  # (any, T)
        index = self.tokens[self.first[which][:, None] + column]
        return DocumentRows(self.batch, self.columns, index, lengths, self.seen[which])

    def alike(self, wanted: torch.Tensor, together: bool = False) -> list[torch.Tensor]:
        """The documents that `wanted` (documents,) picks, in batches of like length: with at most MOST_PADDING columns
        for each token, the longest first. together: all in one."""
        which = wanted.nonzero().squeeze(1)
        if together or not len(which):
            return [which] if len(which) else []
        which = which[self.lengths[which].argsort(descending=True, stable=True)]
        batches, start, tokens = [], 0, 0
        lengths = self.lengths[which].tolist()
        for i, length in enumerate(lengths):
            if (i - start + 1) * lengths[start] > MOST_PADDING * (tokens + length):
                batches.append(which[start:i])
                start, tokens = i, 0
            tokens += length
        return [*batches, which[start:]]

    def last_rows(self) -> Rows:
        """The rows of the input (B, columns) with their last documents alone."""
        mask = torch.zeros(self.batch * self.columns, dtype=torch.bool)
        mask[self.tokens[self.is_last[self.of_token]]] = True
        last = self.is_last.nonzero().squeeze(1)
        seen, fresh = self.behind.clone(), torch.zeros(self.batch, dtype=torch.bool)
        seen[self.row[last]] = self.seen[last]
        fresh[self.row[last]] = (self.seen[last] == 0) & ((self.behind[self.row[last]] > 0) | ~self.leads[last])
        return Rows(self.batch, self.columns, mask.view(self.batch, self.columns), seen, fresh)

    # ---- what heads ask

    def next_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """labels (B, columns) as what each token is to predict: its document's next token, -100 at the last."""
        targets = torch.full_like(labels, -100).flatten()
        goes_on = self.of_token[1:] == self.of_token[:-1]  # (M - 1,)
        here, there = (x[goes_on].to(labels.device) for x in (self.tokens[:-1], self.tokens[1:]))
        targets[here] = labels.flatten()[there]
        return targets.view_as(labels)

    def within(self, targets: torch.Tensor) -> torch.Tensor:
        """targets (B, columns), what each token is to predict, without the first token of another document."""
        targets = targets.clone()
        ends = self.first + self.lengths - 1
        targets.view(-1)[self.tokens[ends[~self.is_last]].to(targets.device)] = -100
        return targets

    def pooled(self, hidden: torch.Tensor, last: bool) -> torch.Tensor:
        """hidden (B, columns, E) at the first or last token of each document, (documents, E)."""
        at = self.first + self.lengths - 1 if last else self.first
        return hidden.flatten(0, 1)[self.tokens[at].to(hidden.device)]

    def first_tokens(self, device) -> torch.Tensor:
        """A mask (B, columns) of each document's first token."""
        mask = torch.zeros(self.batch * self.columns, dtype=torch.bool)
        mask[self.tokens[self.first]] = True
        return mask.view(self.batch, self.columns).to(device)

    def last_tokens(self, device) -> torch.Tensor:
        """A mask (B, columns) of each document's last token."""
        mask = torch.zeros(self.batch * self.columns, dtype=torch.bool)
        mask[self.tokens[self.first + self.lengths - 1]] = True
        return mask.view(self.batch, self.columns).to(device)

    def before(self, marks: torch.Tensor, name: str, what: str) -> torch.Tensor:
        """A mask (B, columns) of the tokens before the first of each document at which marks (B, columns) are True.

        Raises ValueError for a document without one: `name` has no `what`.
        """
        marked = marks.cpu().flatten()[self.tokens].long()  # (tokens,)
        count = marked.cumsum(0)
        count = count - (count - marked)[self.first][self.of_token]  # up to each token, in its own document
        without = count[self.first + self.lengths - 1] == 0
        if bool(without.any()):
            raise ValueError(
                f"{name} has no {what} in documents {without.nonzero().flatten().tolist()} of those that are packed; "
                "put one after the question, or give global_attention_mask"
            )
        mask = torch.zeros(self.batch * self.columns, dtype=torch.bool)
        mask[self.tokens[count == 0]] = True
        return mask.view(self.batch, self.columns).to(marks.device)


def token_columns(rows: Rows) -> torch.Tensor:
    """The tokens of the input's rows in reading order, as columns of [0, B * columns): (tokens,)."""
    if rows.mask is None:
        return torch.arange(rows.batch * rows.columns)
    return rows.mask.cpu().flatten().nonzero().squeeze(1)


def find_documents(
    rows: Rows,
    position_ids: torch.Tensor | None = None,
    *,
    counted: bool = True,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
) -> Documents | None:
    """The documents that the arguments tell of; None where each row is one that goes on from its past.

    counted: positions must be the tokens' places in their documents, for a model that embeds none.

    Raises ValueError if the arguments do not fit the rows or one another.
    """
    tokens = token_columns(rows)
    row = torch.div(tokens, rows.columns, rounding_mode="floor")
    leads = torch.ones(len(tokens), dtype=torch.bool)
    leads[1:] = row[1:] != row[:-1]  # the first token of its row
    by_lengths = _by_lengths(leads, row, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    by_number = None if seq_idx is None else _by_number(rows, tokens, leads, seq_idx)
    by_position, positions = None, None
    if position_ids is not None:
        positions = _of_tokens("position_ids", position_ids, rows, tokens)
        by_position = _by_position(positions, leads)
    told = [x for x in (by_lengths, by_number) if x is not None]
    starts = told[0] if told else leads if by_position is None else by_position
    if len(told) == 2 and not torch.equal(*told):
        raise ValueError("seq_idx and cu_seq_lens_q differ in where documents begin; give one of them")
    if by_position is not None and bool((by_position & ~starts).any()):
        other = "seq_idx" if by_lengths is None else "cu_seq_lens_q"
        raise ValueError(
            f"position_ids start again in the midst of a document of {other}; they must agree in where documents begin"
        )
    fresh = torch.zeros(rows.batch, dtype=torch.bool)
    if by_position is not None and positions is not None:
        fresh[row[leads]] = positions[leads] == 0
    documents = Documents(rows, starts, fresh)
    if counted and positions is not None and not torch.equal(positions, documents.positions):
        raise ValueError(
            "position_ids differ from the tokens' places in their documents, and this model knows distances only; "
            "leave them out, or count from 0 in each document and on from the past in a row that continues it"
        )
    return None if documents.are_rows else documents


def _of_tokens(name: str, x: torch.Tensor, rows: Rows, tokens: torch.Tensor) -> torch.Tensor:
    """Whole numbers x (B or 1, columns) at the tokens, (tokens,)."""
    b, t = rows.batch, rows.columns
    if x.dtype not in (torch.long, torch.int):
        raise ValueError(f"{name} has type {x.dtype}; it must be torch.long or torch.int")
    if x.shape not in ((b, t), (1, t)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {b} rows of {t} tokens need ({b}, {t})")
    return x.cpu().long().expand(b, -1).reshape(-1)[tokens]


def _by_position(positions: torch.Tensor, leads: torch.Tensor) -> torch.Tensor:
    """Starts of documents by positions (tokens,): where they start again. They do so at 0, or all at one other number
    with which the rows begin too; positions that jump in any other way tell of no documents."""
    jumps = ~leads
    jumps[1:] &= positions[1:] != positions[:-1] + 1
    if not bool(jumps.any()):
        return leads
    again = positions[jumps]
    if bool((again == 0).all()) or bool((positions[jumps | leads] == again[0]).all()):
        return jumps | leads
    return leads


def _by_number(rows: Rows, tokens, leads, seq_idx) -> torch.Tensor:
    """Starts of documents by seq_idx (B or 1, columns): where the number changes."""
    number = _of_tokens("seq_idx", seq_idx, rows, tokens)
    starts = leads.clone()
    starts[1:] |= number[1:] != number[:-1]
    return starts


def _by_lengths(leads, row, query_ends, key_ends, query_most, key_most) -> torch.Tensor | None:
    """Starts of documents by cu_seq_lens_q and cu_seq_lens_k, which count tokens and not padding."""
    if query_ends is None and key_ends is None:
        for name, given in (("max_length_q", query_most), ("max_length_k", key_most)):
            if given is not None:
                raise ValueError(f"{name} is {int(given)}, and cu_seq_lens_q is missing; give both or neither")
        return None
    if query_ends is None or key_ends is None:
        missing = "cu_seq_lens_q" if query_ends is None else "cu_seq_lens_k"
        raise ValueError(f"{missing} is missing; give both of cu_seq_lens_q and cu_seq_lens_k, or neither")
    for name, ends in (("cu_seq_lens_q", query_ends), ("cu_seq_lens_k", key_ends)):
        if ends.dtype not in (torch.long, torch.int) or ends.dim() != 1:
            raise ValueError(
                f"{name} has type {ends.dtype} and shape {tuple(ends.shape)}; give (documents + 1,) whole numbers"
            )
    query_ends, key_ends = query_ends.cpu().long(), key_ends.cpu().long()
    if not torch.equal(query_ends, key_ends):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; a document attends to itself, so they must be equal")
    count = len(leads)
    sound = len(query_ends) > 1 and int(query_ends[0]) == 0 and bool((query_ends.diff() >= 0).all())
    if not sound or int(query_ends[-1]) != count:
        shown = (
            query_ends.tolist()
            if len(query_ends) <= 8
            else [*query_ends[:4].tolist(), "...", *query_ends[-3:].tolist()]
        )
        raise ValueError(
            f"cu_seq_lens_q is {shown}; it must rise from 0 to the number of tokens, {count}, padding left out"
        )
    longest = int(query_ends.diff().amax())
    for name, given in (("max_length_q", query_most), ("max_length_k", key_most)):
        if given is not None and int(given) < longest:
            raise ValueError(f"{name} is {int(given)}, but cu_seq_lens_q holds a document of {longest} tokens")
    starts = torch.zeros(count, dtype=torch.bool)
    starts[query_ends[:-1][query_ends.diff() > 0]] = True
    if bool((leads & ~starts).any()):
        crossed = int(row[leads & ~starts][0])
        raise ValueError(
            f"cu_seq_lens_q holds a document that goes on from row {crossed - 1} into row {crossed}; each must end in "
            "its row"
        )
    return starts
