"""Writes the demo's dataset: table requests in free text, and the booking each one means as JSON.

A guest's message ("Hi, could we get a table for four on Fri at half past seven? Maria Okafor") becomes

    {"name": "Maria Okafor", "people": 4, "day": "Friday", "time": "7:30 pm"}

People are a number, the day is its full English name, the time is always written like 7:30 pm, and whatever
the guest leaves out is null. The restaurant is open from noon to ten, so "at seven" always means 7:00 pm.
Messages vary in wording, order, spelling of numbers, days and times, and a quarter of them also hold a remark
with a number, a day or a name that is not part of the booking.

Every prompt is different, and no full name comes twice: however the rows are split by prompt, the test rows
hold no message and no guest from the training rows. The same seed and count give the same bytes anywhere:

    python infra/demo/make_bookings.py --out infra/demo/bookings.jsonl
"""

import argparse
import json
import random
from pathlib import Path

INSTRUCTION = "Write this booking as JSON with the keys name, people, day, time:"

FIRST = (
    "Maria Tomas Aisha Ken Lucia Pavel Ingrid Omar Chloe Raj Nadia Felix Grace Hugo Yuki Leon Amara Sven Rosa "
    "Dylan Elif Marco Hannah Kofi Petra Liam Zara Viktor Mei Oscar Freya Daniel Ines Jonas Priya Samuel Tara Emil "
    "Nora Andre"
).split()
LAST = (
    "Okafor Lindqvist Rossi Tanaka Novak Haddad Fischer Moreau Silva Kowalski Brennan Patel Jensen Castillo "
    "Yilmaz Weber Nguyen Adeyemi Costa Larsen Murphy Horvat Dubois Sato Keller Ivanova Santos Bakker Reyes Walsh "
    "Kim Farkas Olsen Mensah Greco Holm Doyle Singh Vargas Becker"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SHORT_DAYS = dict(zip(DAYS, "Mon Tues Wed Thurs Fri Sat Sun".split(), strict=True))
HOURS = (12, *range(1, 10))
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# Where the guest's name stands: before the request, after it, or nowhere ({n} is the name).
BEFORE = ["Hi, this is {n}.", "{n} here.", "Hello, my name is {n}.", "Good morning, {n} speaking.", "I'm {n}."]
AFTER = ["Thanks, {n}", "The name is {n}.", "Please put it under {n}.", "Booking name: {n}."]
AFTER += ["Best wishes, {n}", "- {n}"]
GREETINGS = ["Hi!", "Hello,", "Good evening.", "Hey there,", "Hi team,", "", "", ""]

# The request itself: {p} is how many ("for four"), {w} is when ("on Friday at 7pm"); either may be empty.
REQUESTS = [
    "Could you book a table{p}{w}?",
    "Can we get a table{p}{w}, please?",
    "I'd like to reserve a table{p}{w}.",
    "Do you have a table{p}{w}?",
    "Table{p}{w}, please.",
    "We want to come for a meal{w}{p2}.",
    "Is there any space{p}{w}?",
    "Please keep a table{p}{w}.",
    "We'd love to eat at your place{w}{p2}.",
    "I need a booking{p}{w}.",
    "Would it be possible to have a table{w}{p}?",
    "Any chance of a table{w}{p}?",
    "Looking for a table{p}{w} if you have one.",
    "Please reserve{w}{p}.",
    "Hoping to visit{w}{p2}.",
]
# Remarks that hold a number, a day or a name, but are not part of the booking.
REMARKS = [
    "One of us is vegetarian.",
    "Last time we were {x} and it was lovely.",
    "We have a voucher for {x}0 euros.",
    "My friend {f} told me about you.",
    "You were closed when I came by on {d}.",
    "We ate with you {x} years ago.",
    "It is {f}'s birthday.",
    "I called on {d} but nobody answered.",
    "A table by the window would be nice.",
    "We will bring a dog.",
    "Is the terrace open?",
    "Do you still have the {x}-course menu?",
]


def people_phrases(count: int, rng: random.Random) -> tuple[str, str]:
    """Say how many come, once to follow "a table" and once to end a sentence such as "we want to come"."""
    word = rng.choice([str(count), NUMBERS[count]])
    if count == 1:
        return rng.choice([" for one", " just for me", " for 1 person"]), rng.choice([", just me", ", only 1 person"])
    after_table = [f" for {word}", f" for {word} people", f" for a party of {word}", f" for {word} of us"]
    at_end = [f", {word} people", f", {word} of us", f", we are {word}", f" as a group of {word}"]
    return rng.choice(after_table), rng.choice(at_end)


def day_phrase(day: str, rng: random.Random) -> str:
    """Say the day in full, in short or in lower case."""
    name = rng.choice([day, day, SHORT_DAYS[day], day.lower()])
    return rng.choice([f" on {name}", f" on {name}", f" this {name}", f" next {name}"])


def time_phrase(hour: int, minute: int, rng: random.Random) -> str:
    """Say the time in digits or in words, with or without "pm"."""
    word, clock = NUMBERS[hour], f"{hour}:{minute:02d}"
    forms = [clock, f"{clock} pm", f"{clock}pm", f"{hour}.{minute:02d}pm"]
    if minute == 0:
        forms = [f"{hour}pm", f"{hour} pm", f"{hour} o'clock", f"{word} o'clock", word]
        forms += ["noon", "midday"] if hour == 12 else []
    elif minute == 15:
        forms += [f"quarter past {word}", f"a quarter past {hour}"]
    elif minute == 30:
        forms += [f"half past {word}", f"half past {hour}"]
    return rng.choice([" at ", " at ", " around "]) + rng.choice(forms)


def make_row(name: str, rng: random.Random) -> dict:
    """Draw one booking, leave out one of its fields or none, and say the rest in a guest's words."""
    people = rng.choices(range(1, 13), weights=[2, 4, 3, 4, 3, 3, 2, 2, 1, 1, 1, 1])[0]
    day, hour, minute = rng.choice(DAYS), rng.choice(HOURS), rng.choice([0, 0, 15, 30, 30, 45])
    missing = rng.choices([None, "name", "people", "day", "time"], weights=[52, 12, 12, 12, 12])[0]
    booking = {"name": name, "people": people, "day": day, "time": f"{hour}:{minute:02d} pm"}
    after_table, at_end = ("", "") if missing == "people" else people_phrases(people, rng)
    when = ["" if missing == "day" else day_phrase(day, rng)]
    when += ["" if missing == "time" else time_phrase(hour, minute, rng)]
    rng.shuffle(when)
    if missing:
        booking[missing] = None
    parts = [rng.choice(REQUESTS).format(p=after_table, p2=at_end, w="".join(when))]
    if rng.random() < 0.25:
        remark = rng.choice(REMARKS)
        remark = remark.format(x=rng.randint(3, 9), d=rng.choice(DAYS), f=rng.choice(FIRST))
        parts.insert(rng.randint(0, 1), remark)
    if missing == "name":
        parts.insert(0, rng.choice(GREETINGS))
    elif rng.random() < 0.5:
        parts.insert(0, rng.choice(BEFORE).format(n=name))
    else:
        parts = [rng.choice(GREETINGS), *parts, rng.choice(AFTER).format(n=name)]
    prompt = INSTRUCTION + "\n" + " ".join(part for part in parts if part)
    answer = json.dumps(booking)
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def make_rows(count: int, seed: int) -> list[dict]:
    """Make `count` rows with distinct prompts, each with a full name of its own."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    if count > len(names):
        raise SystemExit(f"at most {len(names)} rows: every row takes a full name of its own")
    rows = {}  # by prompt
    for name in names[:count]:
        row = make_row(name, rng)
        while row["messages"][0]["content"] in rows:
            row = make_row(name, rng)
        rows[row["messages"][0]["content"]] = row
    return list(rows.values())


def main() -> None:
    """Read the command line and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bookings.jsonl"))
    args = parser.parse_args()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(args.rows, args.seed)]
    args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
