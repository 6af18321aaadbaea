"""Short children's stories from a seeded grammar, for runs that must do without a network.

Each story binds a hero, a friend, a thing with its colour, and two places, and comes back to them later, so that predicting it takes memory
over the whole story and not just over the last words.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

MARK = "<|endoftext|>"
"""What stands between stories."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = {
    "she": _words("Lily Mia Anna Sue Lucy Emma Rosa Nora Ella Jane Zoe Amy Ruby Ivy Clara Mary"),
    "he": _words("Tom Ben Max Sam Tim Leo Jack Finn Bob Dan Adam Noah Otto Paul Eric Hugo"),
}
POSSESSIVE = {"she": "her", "he": "his"}
OBJECT = {"she": "her", "he": "him"}
ANIMALS = _words("cat dog rabbit duck frog bear mouse fox bird pony turtle goat squirrel hen owl sheep")
COLOURS = _words("red blue green yellow pink brown white black purple orange")
THINGS = _words("ball kite hat boat drum book cup scarf bell box lamp doll shell coat basket ribbon spoon whistle")
PLACES = _words("park garden forest beach farm hill river barn market school pond meadow bridge cave kitchen yard")
FOODS = _words("apples cakes berries cookies carrots pears nuts plums soup bread")
FEELINGS = _words("happy sad tired proud scared hungry brave lonely curious sleepy")
WEATHER = _words("sunny rainy windy cold warm foggy snowy quiet")

OPENINGS = [
    "Once upon a time there was a little {kind} named {hero}. {Hero} had a {colour} {thing}, and {they} loved it very much.",
    "One {weather} day, a little {kind} named {hero} went to the {place}. {They} took {their} {colour} {thing} along.",
    "There once lived a {feeling} {kind} whose name was {hero}. {Their} best friend was {friend}, a small {animal}.",
    "{Hero} was a little {kind} who lived near the {place}. Every morning {they} played with {their} {colour} {thing}.",
]
TROUBLES = [
    "One {weather} morning the {thing} was gone. {Hero} looked under the bed and behind the door, but it was not there.",
    "Then a big wind came and blew the {colour} {thing} far away over the {place}. {Hero} began to cry.",
    "At the {place}, {hero} put the {thing} down to eat some {food}. When {they} looked again, somebody had taken it.",
    "But the {colour} {thing} fell and broke. {Hero} felt very {feeling} and did not know what to do.",
    "{Hero} wanted to give the {thing} to {friend}, but {they} had left it at the {place} the day before.",
]
TALKS = [
    '"Why are you {feeling}?" asked {friend} the {animal}. "I lost my {colour} {thing}," said {hero}.',
    '"Do not worry, {hero}," said {friend}. "We will look for your {thing} together."',
    '"Can you help me?" {hero} asked the {animal}. "Yes, I can," said {friend}. "Tell me about your {thing}."',
    '"I saw something {colour} near the {place2}," said {friend}. "Let us go and see!" said {hero}.',
]
EVENTS = [
    "They walked past the {place} and came to the {place2}.",
    "On the way they met a {animal2}, who was {feeling2}. They gave the {animal2} some {food}, and it said thank you.",
    "It was {weather} and the road was long. {Friend} sang a song to make {hero} laugh.",
    '"I am {feeling2}," said {friend}. So they sat down under a tree and ate {food}.',
    "They asked the {animal2} about the {thing}. The {animal2} pointed to the {place2}.",
    "{Hero} climbed on a rock and looked around, but {they} saw only the {place2}.",
    "A {colour2} bird flew by. {Hero} thought it was the {thing}, but it was not {colour}.",
    "{Friend} ran ahead to the {place2}, and {hero} ran after {them_friend}.",
]
ENDS = [
    "At last, at the {place2}, {hero} saw something {colour}. It was the {thing}! {They} hugged {friend} and said thank you.",
    "There it was: the {colour} {thing} lay in the grass of the {place2}. {Hero} jumped for joy, and so did {friend}.",
    "The {animal2} came with the {colour} {thing} in its mouth. {Hero} was so happy that {they} danced with {friend}.",
    "They did not find the {thing}, but {friend} made a new one, and it was {colour} too. {Hero} liked it even more.",
]
CLOSINGS = [
    "From that day on, {hero} and {friend} took good care of the {colour} {thing}.",
    "{Hero} went home with the {thing} and told {their} mom about {friend} the {animal}. Then {they} fell asleep.",
    "{Hero} learned that it is good to have a friend like {friend}. They lived happily ever after.",
    'That night {hero} said, "Good night, {thing}. Good night, {friend}." And everybody was happy.',
]


def stories(number: int, seed: int = 0) -> Iterator[str]:
    """`number` stories of 80 to 200 words, the same for the same seed."""
    for index in range(number):
        yield story(random.Random(f"{seed} {index}"))


def story(chance: random.Random) -> str:
    """One story."""
    hero_is, friend_is = chance.choice(["she", "he"]), chance.choice(["she", "he"])
    hero = chance.choice(NAMES[hero_is])
    friend = chance.choice([name for name in NAMES[friend_is] if name != hero])
    animal, animal2 = chance.sample(ANIMALS, 2)
    place, place2 = chance.sample(PLACES, 2)
    colour, colour2 = chance.sample(COLOURS, 2)
    feeling, feeling2 = chance.sample(FEELINGS, 2)
    words = {
        "kind": {"she": "girl", "he": "boy"}[hero_is],
        "hero": hero,
        "friend": friend,
        "they": hero_is,
        "their": POSSESSIVE[hero_is],
        "them_friend": OBJECT[friend_is],
        "animal": animal,
        "animal2": animal2,
        "place": place,
        "place2": place2,
        "colour": colour,
        "colour2": colour2,
        "feeling": feeling,
        "feeling2": feeling2,
        "thing": chance.choice(THINGS),
    }
    words |= {name.capitalize(): words[name].capitalize() for name in ("hero", "friend", "they", "their")}
    parts = [chance.choice(OPENINGS), chance.choice(TROUBLES), *chance.sample(TALKS, 2)]
    parts += [*chance.sample(EVENTS, chance.randint(1, 4)), chance.choice(ENDS), chance.choice(CLOSINGS)]
    told = [part.format(**words, food=chance.choice(FOODS), weather=chance.choice(WEATHER)) for part in parts]
    return " ".join(told[:2]) + "\n" + " ".join(told[2:-2]) + "\n" + " ".join(told[-2:])
