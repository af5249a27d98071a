"""Random short English sentences for the spoken corpus, from templates and word lists."""

from __future__ import annotations

import zlib

import numpy as np

_WORDS = {  # placeholder -> words that fill it
    "one": "ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT, NINE, TEN, ELEVEN, TWELVE, THIRTEEN, FOURTEEN, "
           "FIFTEEN, SIXTEEN, SEVENTEEN, EIGHTEEN, NINETEEN",
    "ten": "TWENTY, THIRTY, FORTY, FIFTY, SIXTY, SEVENTY, EIGHTY, NINETY",
    "nth": "FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH, NINTH, TENTH, ELEVENTH, TWELFTH, THIRTEENTH, "
           "FOURTEENTH, FIFTEENTH, SIXTEENTH, SEVENTEENTH, EIGHTEENTH, NINETEENTH, TWENTIETH",
    "weekday": "MONDAY, TUESDAY, WEDNESDAY, THURSDAY, FRIDAY, SATURDAY, SUNDAY",
    "month": "JANUARY, FEBRUARY, MARCH, APRIL, MAY, JUNE, JULY, AUGUST, SEPTEMBER, OCTOBER, NOVEMBER, DECEMBER",
    "part": "IN THE MORNING, IN THE EVENING, AT NIGHT, TODAY, TOMORROW",
    "switch": "TURN ON, TURN OFF, SWITCH ON, SWITCH OFF",
    "device": "LIGHT, LAMP, HEATING, RADIO, FAN, TELEVISION, ALARM",
    "room": "KITCHEN, BEDROOM, GARAGE, OFFICE, GARDEN, HALL",
    "opening": "DOOR, WINDOW, GATE, BOX, CURTAIN",
    "move": "OPEN, CLOSE, LOCK, CHECK",
    "kin": "MOTHER, FATHER, SISTER, BROTHER, UNCLE, DOCTOR, TEACHER, FRIEND",
    "whose": "MY, YOUR, HIS, THE",
    "verb": "WANTS, LIKES, FOUND, LOST, BOUGHT, BROUGHT, KEPT, PAINTED",
    "colour": "RED, BLUE, GREEN, YELLOW, BLACK, WHITE, BROWN",
    "size": "BIG, SMALL, LONG, OLD, HEAVY, EMPTY",
    "thing": "BOOK, TABLE, CAR, BOTTLE, HOUSE, LETTER, JACKET, CAMERA, PICTURE, BICYCLE",
    "animal": "DOG, CAT, HORSE, BIRD, RABBIT, SHEEP",
    "act": "SLEEPS, RUNS, WAITS, SITS, HIDES, PLAYS",
    "place": "UNDER THE TREE, BY THE RIVER, NEAR THE BRIDGE, IN THE FOREST, ON THE ROAD, BEHIND THE WALL",
    "food": "BREAD, CHEESE, SOUP, RICE, FRUIT, COFFEE, WATER, SUGAR, CHOCOLATE",
    "town": "LONDON, PARIS, DUBLIN, BOSTON, CHICAGO, BERLIN",
    "sky": "SUNNY, CLOUDY, WINDY, COLD, WARM, RAINY",
    "media": "THE NEWS, SOME MUSIC, A SONG, THE MESSAGE, A STORY",
    "play": "PLAY, STOP, REPEAT, FIND",
    "name": "ANNA, PETER, MARY, THOMAS, LAURA, GEORGE, OLIVER",
    "ask": "WHERE IS, HERE IS, I CAN'T FIND, PLEASE BRING, DON'T FORGET, WE NEED",
    "vehicle": "TRAIN, BUS, PLANE, BOAT",
    "leave": "LEAVES, ARRIVES, STOPS",
    "please": "PLEASE, NOW, AGAIN, QUICKLY",
    "unit": "MINUTES, HOURS, DAYS, WEEKS, MILES, METRES, DOLLARS, PEOPLE",
}  # fmt: skip

WORDS = {placeholder: text.split(", ") for placeholder, text in _WORDS.items()}
ONES, TENS, ORDINALS = WORDS["one"], WORDS["ten"], WORDS["nth"]

# {number}, {small}, {ordinal}, {digits} and {time} are generated; the other placeholders are keys of WORDS.
TEMPLATES = (
    "{number}", "{number} {unit}", "{digits}", "{digits}", "IT COSTS {number} DOLLARS", "IN {number} {unit}",
    "{weekday} THE {ordinal} OF {month}", "{weekday} {month} THE {ordinal}", "ON {weekday} {part}",
    "THE {ordinal} OF {month}", "{month} THE {ordinal}", "THE {ordinal} OF {month} {part}", "{ordinal} OF {month}",
    "{time}", "{time} {part}", "{weekday} AT {time}", "WAKE ME AT {time}", "IT'S {time}", "MEET {name} AT {time}",
    "{switch} THE {room} {device}", "{switch} THE {device} {please}", "{move} THE {opening} {please}",
    "{move} THE {room} {opening}", "{move} THE {colour} {opening}", "SET THE {device} TO {small}",
    "{play} {media} {please}", "CALL {whose} {kin} {please}", "CALL {name} AT {time}", "WAIT {small} MINUTES {please}",
    "{whose} {kin} {verb} THE {thing}", "{name} {verb} A {colour} {thing}", "{whose} {kin} {verb} THE {size} {thing}",
    "THE {colour} {animal} {act} {place}", "THE {size} {animal} {act}", "{ask} THE {colour} {thing}",
    "{ask} {whose} {size} {thing}", "{ask} THE {food}", "{name} {verb} THE {food}", "WE NEED {small} {unit}",
    "WHAT'S THE WEATHER IN {town}", "IT'S {sky} IN {town} {part}", "IT WAS {sky} ON {weekday}",
    "THE {vehicle} TO {town} {leave} AT {time}", "THE {vehicle} {leave} IN {small} MINUTES", "A {vehicle} TO {town}",
    "{name} IS IN THE {room}", "I'M GOING TO {town} ON {weekday}", "{name} AND {name} {part}",
)  # fmt: skip

MIN_LENGTH, MAX_LENGTH = 6, 40  # characters of a sentence


def number_in_words(number: int) -> str:
    """Spell out 0 to 999."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
    return f"{ONES[number // 100]} HUNDRED" + (f" AND {number_in_words(number % 100)}" if number % 100 else "")


def ordinal_in_words(number: int) -> str:
    """Spell out 1 to 31 as an ordinal."""
    if number <= 20:
        return ORDINALS[number - 1]
    return f"{TENS[number // 10 - 2]} {ORDINALS[number % 10 - 1]}" if number % 10 else "THIRTIETH"


def _random_time(rng: np.random.Generator) -> str:
    hour = ONES[rng.integers(1, 13)]
    style = rng.integers(4)
    if style == 0:
        return f"{hour} O'CLOCK"
    if style == 1:
        return f"{rng.choice(['HALF PAST', 'QUARTER PAST', 'QUARTER TO'])} {hour}"
    if style == 2:
        return f"{number_in_words(int(rng.choice([5, 10, 20, 25])))} {rng.choice(['PAST', 'TO'])} {hour}"
    return f"{hour} {number_in_words(int(rng.integers(10, 60)))}"


def _random_number(rng: np.random.Generator, end: int) -> int:
    """Draw a number in [2, end); one in four is from 10 to 19, because each of these is a separate word."""
    return int(rng.integers(10, 20) if rng.random() < 0.25 else rng.integers(2, end))


def _random_words(placeholder: str, rng: np.random.Generator) -> str:
    if placeholder == "number":
        return number_in_words(_random_number(rng, 1000))
    if placeholder == "small":
        return number_in_words(_random_number(rng, 100))
    if placeholder == "ordinal":
        return ordinal_in_words(int(rng.integers(1, 32)))
    if placeholder == "digits":
        return " ".join(ONES[d] for d in rng.integers(0, 10, size=rng.integers(3, 7)))
    if placeholder == "time":
        return _random_time(rng)
    return str(rng.choice(WORDS[placeholder]))


def random_sentence(rng: np.random.Generator, role: str) -> str:
    """Draw a sentence of MIN_LENGTH to MAX_LENGTH characters for `role` ("train", "dev" or "test").

    A hash of the text decides the role, so no sentence occurs in two of them.
    """
    while True:
        parts = TEMPLATES[rng.integers(len(TEMPLATES))].split("{")
        text = parts[0]
        for part in parts[1:]:
            placeholder, rest = part.split("}")
            text += _random_words(placeholder, rng) + rest
        assigned_role = {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 8, "train")
        if assigned_role == role and MIN_LENGTH <= len(text) <= MAX_LENGTH:
            return text
