"""A closed world in which search can be counted: people, how they are related, and questions of a known depth.

A question is a person and a chain of k relations; the answer is the person at its end. One search follows one relation
and misses with a chance of 15 %, decided by its wording: whoever asks again has to ask in other words. So k relations
take k / 0.85 searches at best, and no question can be answered without searching, except those about facts that a
policy has been taught by heart (`KNOWN`).
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tenfold.agent.data import Question
from tenfold.agent.policies import Scripted
from tenfold.agent.protocol import QUERIES, SEARCH, Message
from tenfold.agent.search import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIRST_NAMES = """
    ada ben cleo dan eva finn gina hugo iris jack kate liam mona noah olga paul rosa sam tess umar vera walt
    xena yuri zoe amos bea carl dora emil faye gus hana ivan june kurt lena max nora otto
    """
_LAST_NAMES = """
    abbot baker cole drake ellis frost grant hayes irwin jones king lane mills nash owens price quinn reed scott
    tate upton vance webb xu young zimmer ash bell clark dunn eaton fox gray hill inman kerr lowe moss north
    park
    """
FIRST, LAST = tuple(_FIRST_NAMES.split()), tuple(_LAST_NAMES.split())
RELATIONS = ("mother", "father", "teacher", "employer", "neighbour", "rival", "doctor", "heir")
# The relation of the facts that can be taught by heart. The world answers it as well.
KNOWN = "namesake"
_ENTITIES, _HELD_OUT, _KNOWN = 1_200, 200, 40
# Pieces of the paper's form, each a token of the small policy.
_THINKING, _THOUGHT, _CALL, _CALL_END = "<thinking>", "</thinking>", f"{SEARCH}|{{'{QUERIES}':['", "']}"
# The shares of the depths in a cold start.
SFT_WEIGHTS = {1: 0.48, 2: 0.45, 3: 0.04, 4: 0.03}
# Mostly the depths that the cold start leaves open. Chosen by the accuracy of the training's own rollouts, which begin
# with other people than the questions that are measured.
RL_WEIGHTS = {1: 0.05, 2: 0.1, 3: 0.35, 4: 0.5}
# How often a search finds nothing, by its wording.
MISS = 0.15


@dataclass(frozen=True)
class World:
    """Who is related to whom, and which searches find it.

    Args:
        seed: of people, relations, and misses.
    """

    seed: int = 0
    name: str = "world"

    @cached_property
    def people(self) -> tuple[str, ...]:
        """First and last names: those that questions of training begin with, then those that are held out."""
        everyone = [f"{first} {last}" for first, last in itertools.product(FIRST, LAST)]
        return tuple(random.Random(f"people {self.seed}").sample(everyone, _ENTITIES))

    @cached_property
    def facts(self) -> Mapping[tuple[str, str], str]:
        """(person, relation) to person."""
        draw = random.Random(f"facts {self.seed}")
        people = self.people
        facts = {(person, relation): draw.choice(people) for person in people for relation in RELATIONS}
        facts |= {(person, KNOWN): draw.choice(people) for person in people[:_KNOWN]}
        return facts

    def found(self, query: str) -> str | None:
        """Whom a search finds: it names a person and one relation, in any order, and this wording does not miss."""
        words = query.casefold().split()
        first = [word for word in words if word in _FIRST]
        last = [word for word in words if word in _LAST]
        relation = [word for word in words if word in _RELATION]
        if (len(first), len(last), len(relation), len(words)) != (1, 1, 1, 3):
            return None
        digest = hashlib.sha256(f"{self.seed} {' '.join(words)}".encode()).digest()
        if int.from_bytes(digest[:4]) < MISS * 2**32:
            return None
        return self.facts.get((f"{first[0]} {last[0]}", relation[0]))

    async def search(self, query: str, count: int) -> list[Result]:
        """The engine's side of `found`."""
        found = self.found(query)
        if found is None:
            return []
        digest = hashlib.sha256(found.encode()).hexdigest()
        return [Result(f"world:{found.replace(' ', '-')}", "", found, None, 1.0, (found,), self.name, digest, "")]

    def question(self, number: int, hops: int, held_out: bool = False) -> Question:
        """Question `number` of a depth; `held_out` begins with people that no question of training begins with."""
        draw = random.Random(f"question {self.seed} {number} {hops} {held_out}")
        people = self.people[-_HELD_OUT:] if held_out else self.people[:-_HELD_OUT]
        person = draw.choice(people)
        relations = draw.choices(RELATIONS, k=hops)
        path = [person]
        for relation in relations:
            path.append(self.facts[path[-1], relation])
        text = " ".join([person, *relations])
        split = "held-out" if held_out else "train"
        return Question(f"{split}-{hops}-{number}", text, (path[-1],), hops, tuple(path), tuple(relations), "world")

    def known_question(self, number: int) -> Question:
        """A question about a fact that can be taught by heart. There are 40 of them; its depth counts as 0."""
        person = self.people[number % _KNOWN]
        answer = self.facts[person, KNOWN]
        return Question(
            f"known-{number % _KNOWN}", f"{person} {KNOWN}", (answer,), 0, (person, answer), (KNOWN,), "world"
        )

    def draw(self, number: int, weights: Mapping[int, float], seed: int = 0) -> Question:
        """Question `number` of a training stream in which depths come by their weights; depth 0 are known facts."""
        chosen = random.Random(f"draw {self.seed} {seed} {number}")
        hops = chosen.choices(list(weights), list(weights.values()))[0]
        name = chosen.randrange(2**40)
        return self.known_question(name) if hops == 0 else self.question(name, hops)

    def held_out(self, hops: Sequence[int], count: int) -> list[Question]:
        """Questions to evaluate on: `count` of each depth above 0, and the known facts for depth 0; no two alike."""
        questions: list[Question] = []
        for depth in hops:
            if depth == 0:
                questions += [self.known_question(number) for number in range(_KNOWN)]
                continue
            seen: dict[str, Question] = {}
            for number in itertools.count():
                question = self.question(number, depth, held_out=True)
                seen.setdefault(question.question, question)
                if len(seen) == count:
                    break
            questions += seen.values()
        return questions

    def expert(self) -> Scripted:
        """The policy to learn from: one search for each relation, asked in other words where nothing was found. It
        thinks of the relations that it has still to follow. Known facts are answered at once."""
        return Scripted(self._next, "expert")

    def _next(self, messages: Sequence[Message]) -> str:
        first, last, *relations = str(messages[0]["content"]).split()
        person = f"{first} {last}"
        if relations == [KNOWN]:
            return f"{_THINKING} {_THOUGHT} {self.facts[person, KNOWN]}"
        tries = 0
        for message in messages[1:]:
            if message["role"] != "user":
                continue
            told = str(message["content"]).splitlines()
            if told[0].startswith("found "):
                person, tries = told[0].removeprefix("found "), 0
                relations.pop(0)
            else:
                tries += 1
            if "stop" in told:
                relations.clear()
        wordings = _wordings(person, relations[0]) if relations else ()
        if tries >= len(wordings):
            return f"{_THINKING} {_THOUGHT} {person}"
        return f"{_THINKING} {' '.join(relations)} {_THOUGHT} {_CALL} {wordings[tries]} {_CALL_END}"


_FIRST, _LAST, _RELATION = frozenset(FIRST), frozenset(LAST), frozenset((*RELATIONS, KNOWN))


def _wordings(person: str, relation: str) -> tuple[str, str, str]:
    first, last = person.split()
    return f"{first} {last} {relation}", f"{relation} {first} {last}", f"{last} {first} {relation}"


def tiny_policy(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new policy for the world: a Llama of about 150,000 parameters with random weights, and its tokenizer of words.

    Returns:
        A `transformers` model and tokenizer.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.125,  # with 0.02, the value of wide models, this one is far slower to learn copying
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model, tokenizer


def word_tokenizer() -> PreTrainedTokenizerBase:
    """A `transformers` tokenizer with a token for each word of the world and each piece of the paper's form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
    form = [_THINKING, _THOUGHT, _CALL, _CALL_END]
    words = [*special, *form, "found", "nothing", "form", "stop", *FIRST, *LAST, *RELATIONS, KNOWN]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer
