"""Prompts on eight topics, made from templates.

Every topic has two sets of templates that share no wording: one to tune on, one to report on.
"""

import random

FILL = {
    "food": "apples pears rice bread soup pasta cheese honey carrots onions beans salmon eggs spinach lentils mushrooms",
    "city": "Paris London Berlin Rome Madrid Oslo Cairo Lima Tokyo Delhi Lagos Sydney Toronto Seoul Prague Athens",
    "function": "sorted zip enumerate map filter any all open print range sum isinstance getattr json.loads "
                "os.path.join re.match itertools.chain functools.reduce collections.Counter",
    "unit": "miles kilometres metres feet pounds kilograms litres gallons inches yards ounces grams",
    "part": "knee back shoulder stomach throat head neck ankle wrist elbow hip foot",
    "activity": "running swimming gardening cycling tennis yoga climbing dancing typing driving skiing boxing",
    "word": "garden river bottle window candle mirror pencil blanket ladder hammer basket pillow lantern saddle "
            "teapot curtain violin anchor",
    "event": "French-Revolution fall-of-Rome Cold-War Black-Death Meiji-Restoration Treaty-of-Versailles "
             "Mongol-conquests Industrial-Revolution Russian-Revolution Thirty-Years'-War Crusades Boxer-Rebellion",
    "aspect": "farmers trade women science religion cities art armies money law ships schools",
}
VALUES = {name: [value.replace("-", " ") for value in values.split()] for name, values in FILL.items()}

TEMPLATES = {  # topic: (templates to tune on, templates to report on)
    "arithmetic": (
        ["What is {a} plus {b}?", "Compute {a} times {b} minus {c}.", "What is {a} percent of {b}?",
         "If I have {a} {food} and buy {b} more, how many do I have?", "Work out {a} * {b}."],
        ["How much is {a} divided by {b}?", "Add up {a}, {b} and {c}.", "Find the product of {a} and {b}.",
         "A shop sold {a} items on Monday and {b} on Tuesday. What is the total?",
         "Subtract {c} from {a} and double the result."]),
    "units": (
        ["Convert {a} {unit} to {unit2}.", "How many {unit} are {a} {unit2}?", "{a} {unit} in {unit2}, please."],
        ["Express {a} {unit} in {unit2}.", "I measured {a} {unit}. What is that in {unit2}?",
         "Change {a} {unit} into {unit2}."]),
    "words": (
        ["Reverse the words {word} and {word2}.", "Write {word} {word2} in upper case letters.",
         "How many vowels do {word} and {word2} have?", "Find {c} words that rhyme with {word}."],
        ["Spell {word} and then {word2} backwards.", "Count the letters of the words {word} and {word2}.",
         "Which letters do {word} and {word2} share?", "Make {c} anagrams of {word}."]),
    "python": (
        ["What does {function} do in Python?", "Explain the Python function {function} to {c} beginners.",
         "Why does {function} raise a TypeError on line {a} of my Python script?",
         "Show {c} examples with {function} and {function2}."],
        ["How do I use {function} together with {function2} in Python?",
         "Rewrite this Python loop over {a} items with {function}.",
         "What is the difference between {function} and {function2}?",
         "Write {c} unit tests for a Python function that calls {function}."]),
    "cooking": (
        ["How do I cook {food} with {food2}?", "Suggest {c} recipes that use {food}.",
         "How long should I boil {food} for {c} guests?", "What can replace {food} in a stew with {food2}?"],
        ["Give me a quick dinner idea with {food} and {food2}.", "How do I store {c} kilos of fresh {food}?",
         "Which spices go well with {food} and {food2}?", "Write a shopping list for a {food} salad for {c} people."]),
    "travel": (
        ["What should I see in {city} in {c} days?", "Plan a trip from {city} to {city2}.",
         "Which district of {city} is best for a hotel for {c} nights?", "Is {city} worth a visit after {city2}?"],
        ["How do I get from the airport of {city} to the centre before {c} o'clock?",
         "Write an itinerary for {c} days in {city}.", "Compare {city} and {city2} as holiday destinations.",
         "Which {c} museums in {city} are free?"]),
    "health": (
        ["My {part} hurts after {activity}. What can I do?", "Which exercises strengthen the {part} for {activity}?",
         "When should I see a doctor about a {part} that is sore from {activity}?"],
        ["How can I relieve the pain that {activity} causes in my {part}?",
         "What makes a {part} swell after {activity}?", "Give me stretches against a stiff {part} before {activity}."]),
    "history": (
        ["What did the {event} mean for {aspect}?", "Summarise the {event} and its causes in {c} sentences.",
         "Who shaped {aspect} at the time of the {event}?"],
        ["How did the {event} change {aspect} around the world?", "Write a timeline of the {event} with {c} entries.",
         "What were the consequences of the {event} for {aspect}?"]),
}


def _filled(template: str, draw: random.Random) -> str:
    values = {name: draw.sample(choices, 2) for name, choices in VALUES.items()}
    words = {name: first for name, (first, _) in values.items()} | {f"{n}2": second for n, (_, second) in values.items()}
    return template.format(a=draw.randint(2, 99), b=draw.randint(2, 99), c=draw.randint(3, 30), **words)


def prompts(
    report: bool,  # from the templates to report on, otherwise from those to tune on
    per_topic: int = 300,
) -> tuple[list[str], list[int]]:  # texts and their topics, by topic
    "Different prompts of every topic."
    texts, topics = [], []
    for topic, (name, sets) in enumerate(TEMPLATES.items()):
        draw, found = random.Random(f"{name} {report}"), {}
        for _ in range(50 * per_topic):
            found.setdefault(_filled(draw.choice(sets[report]), draw))
            if len(found) == per_topic:
                break
        texts += found
        topics += [topic] * len(found)
    return texts, topics
