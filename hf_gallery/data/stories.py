"""State tracking: short stories to be followed among sentences that say nothing about them."""

from __future__ import annotations

from random import Random

import numpy as np
from datasets import Dataset

from .examples import check, dataset, generator, unscored

PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("apple", "book", "coin", "drum", "flute", "key", "lamp", "map")
# All of one length: an answer ends its text, so who can count columns would know how long it is.
ROOMS = ("attic", "cabin", "foyer", "lobby", "porch", "study", "tower", "vault")
IDLE = (  # tells nothing of people, things and rooms
    " Rain falls on the roof.",
    " A clock strikes six.",
    " The wind blows from the sea.",
    " Somewhere a dog barks.",
    " The old stairs creak.",
    " Nobody says a word.",
    " Clouds drift over the hills.",
    " It is getting late.",
)


def state_tracking(
    examples: int,
    length: int,
    *,
    facts: int = 1,
    events: int = 12,
    num_people: int = 4,
    num_things: int = 3,
    num_questions: int = 1,
    seed: int = 0,
    split: str = "train",
) -> Dataset:
    """People who move between rooms, take things along and leave them somewhere, in the manner of bAbI's tasks 1 to 3
    (Weston et al. 2015), hidden in sentences without meaning.

    `events` sentences, "Ann goes to the porch. Ann takes the coin. Ann drops the coin.", stand at random places of a
    text of `length` bytes. The last words ask; the room is scored, with the space before it. By `facts`, the number of
    sentences that an answer needs:
    1: "Now Ann is in the porch", where she went last.
    2: "Now the coin is in the porch", where its bearer went last, or was when it was dropped.
    3: "Before the porch the coin was in the attic", from where its bearer brought it.
    The distance counts from the latest sentence from which on the text tells the answer.

    Chance is 1 / 8, the rooms; with 3 facts 1 / 7, as a thing comes from another room. The first letter tells which.

    events: 3 facts num_questions or more. num_people: 1 to 8. num_things: 1 to 8. num_questions: up to num_people (1
    fact) or num_things. length: 26 events + 49 num_questions or more.

    Raises ValueError for an argument outside these limits, and where such stories hardly ever answer that many.
    """
    check("examples", examples, 1)
    check("facts", facts, 1, 3)
    check("num_people", num_people, 1, len(PEOPLE))
    check("num_things", num_things, 1, len(THINGS))
    check("num_questions", num_questions, 1, num_people if facts == 1 else num_things)
    check("events", events, 3 * facts * num_questions)
    check("length", length, 26 * events + 49 * num_questions)
    random = Random(int(generator(seed, split, "state_tracking").integers(2**62)))
    ids = np.zeros((examples, length), dtype=np.int64)
    labels, distance = unscored(examples, length)
    for row in range(examples):
        for _ in range(10_000):
            story = _Story(random, events, PEOPLE[:num_people], THINGS[:num_things])
            told = {1: story.people, 2: story.things, 3: story.brought}[facts]()
            if len(told) >= num_questions:
                break
        else:
            raise ValueError(
                f"{events} events with {num_people} people and {num_things} things hardly ever answer {num_questions} "
                f"question(s) of {facts} facts; raise events"
            )
        asked = _sample(random, told, num_questions)
        text, begins = _spread(random, story.sentences, length - sum(len(a + b) for a, b, _ in asked) - len(asked) + 1)
        for question, answer, told in asked:
            at = len(text) + len(question)
            text += question + answer + "."
            labels[row, at : at + len(answer)] = np.frombuffer(answer.encode(), dtype=np.uint8)
            distance[row, at : at + len(answer)] = at - begins[told]
        ids[row] = np.frombuffer(text[:-1].encode(), dtype=np.uint8)
    return dataset(ids, labels, distance)


class _Story:
    """Events drawn one by one, and what they let a reader know.

    A question is (its words, the answer, the number of the sentence from which on the story tells the answer).
    """

    def __init__(self, random: Random, events: int, people: tuple[str, ...], things: tuple[str, ...]):
        self.sentences: list[str] = []
        self.room: dict[str, str] = {}  # of each person
        self.moved: dict[str, int] = {}  # sentence that said so
        self.bearer: dict[str, str] = {}  # of each thing that is carried
        self.taken: dict[str, int] = {}  # sentence that said so
        self.path: dict[str, list[str]] = {}  # rooms of each thing
        self.tells: dict[str, list[int]] = {}  # where to begin to hear of its room now, and of the one before as well
        while len(self.sentences) < events:
            person = _pick(random, people)
            what = random.random()
            if person not in self.room or what < 0.5:
                self._go(person, _pick(random, [room for room in ROOMS if room != self.room.get(person)]))
            elif what < 0.85:
                room = self.room[person]
                here = [t for t in things if t not in self.bearer and self.path.get(t, [room])[-1] == room]
                if here:
                    self._take(person, _pick(random, here))
            else:
                held = [t for t in things if self.bearer.get(t) == person]
                if held:
                    self._drop(person, _pick(random, held))

    def _go(self, person: str, room: str):
        for thing in (t for t, bearer in self.bearer.items() if bearer == person):
            self.path[thing].append(room)
            self.tells[thing] = [self.taken[thing], min(self.taken[thing], self.tells[thing][0])]
        self.room[person], self.moved[person] = room, len(self.sentences)
        self.sentences.append(f" {person} goes to the {room}.")

    def _take(self, person: str, thing: str):
        self.bearer[thing], self.taken[thing] = person, len(self.sentences)
        self._is_here(person, thing)
        self.sentences.append(f" {person} takes the {thing}.")

    def _drop(self, person: str, thing: str):
        del self.bearer[thing]
        self._is_here(person, thing)
        self.sentences.append(f" {person} drops the {thing}.")

    def _is_here(self, person: str, thing: str):
        self.path.setdefault(thing, [self.room[person]])
        now, before = self.tells.get(thing, (-1, -1))
        self.tells[thing] = [max(now, self.moved[person]), before]

    def people(self) -> list[tuple[str, str, int]]:
        """The place of each person mentioned so far."""
        return [(f" Now {person} is in the", f" {room}", self.moved[person]) for person, room in self.room.items()]

    def things(self) -> list[tuple[str, str, int]]:
        """The place of each thing mentioned so far."""
        return [(f" Now the {t} is in the", f" {path[-1]}", self.tells[t][0]) for t, path in self.path.items()]

    def brought(self) -> list[tuple[str, str, int]]:
        """The origin of each thing that was brought to a room in which it was never before."""
        return [
            (f" Before the {path[-1]} the {thing} was in the", f" {path[-2]}", self.tells[thing][1])
            for thing, path in self.path.items()
            if len(path) > 1 and path.count(path[-1]) == 1
        ]


def _spread(random: Random, sentences: list[str], length: int) -> tuple[str, list[int]]:
    """A text of `length` bytes with the sentences in order among idle ones, which may begin in the middle of an idle
    one; and the column at which each sentence begins."""
    idle: list[str] = []
    left = length - sum(map(len, sentences))
    while left > 0:
        idle.append(_pick(random, IDLE)[-left:])
        left -= len(idle[-1])
    idle.reverse()  # the one that was cut is first
    text, begins = "", []
    places = sorted(min(1 + int(random.random() * len(idle)), len(idle)) for _ in sentences)
    for i, sentence in enumerate([*sentences, ""]):
        text += "".join(idle[places[i - 1] if i else 0 : places[i] if i < len(places) else None])
        begins.append(len(text))
        text += sentence
    return text, begins[:-1]


def _pick(random: Random, among):
    # random() and nothing else: it is what Python promises to keep from version to version
    return among[int(random.random() * len(among))]


def _sample(random: Random, among: list, count: int) -> list:
    """`count` of them, each at most once."""
    left = list(among)
    return [left.pop(int(random.random() * len(left))) for _ in range(count)]
