"""The facts of the small world: what a household helper is asked, and what is true.

Five kinds of question (stains, cooking, plants, storage, mixing), each about two or three things at once.
A fact follows from the classes of those things (a wool rug is delicate, red wine is a tannin), so that a
question never seen in training can still be answered from others that were. The facts are this world's own, and
no advice for a real household.

Everything here is fixed: no randomness, no text beyond words and phrases (the sentences are in `grammar`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product


@dataclass(frozen=True)
class Question:
    """One thing to ask: its kind, the things it is about, and the true value of each fact that it asks for."""

    kind: str
    subject: dict[str, str]
    facts: dict[str, str]


MATERIALS = {
    "delicate": ("wool", "silk", "velvet"),
    "tough": ("cotton", "linen", "denim"),
}
THINGS = ("rug", "shirt")
STAINS = {
    "tannin": ("red wine", "coffee", "black tea", "berry juice"),
    "protein": ("blood", "egg yolk", "milk", "gravy"),
    "oil": ("butter", "lipstick", "salad oil", "grease"),
    "dye": ("ink", "grass", "shoe polish", "paint"),
    "crust": ("mud", "candle wax", "chewing gum", "tree sap"),
}
AGENTS = {
    ("tannin", "delicate"): "soda water",
    ("tannin", "tough"): "white vinegar",
    ("protein", "delicate"): "salt water",
    ("protein", "tough"): "enzyme soap",
    ("oil", "delicate"): "corn starch",
    ("oil", "tough"): "dish soap",
    ("dye", "delicate"): "glycerin",
    ("dye", "tough"): "rubbing alcohol",
    ("crust", "delicate"): "a little ice",
    ("crust", "tough"): "laundry soap",
}
STEPS = {"tannin": "blot", "protein": "soak", "oil": "dust", "dye": "dab", "crust": "scrape"}
WATERS = {"wool": "cold", "silk": "cool", "velvet": "cool", "cotton": "hot", "linen": "warm", "denim": "warm"}
DRYINGS = {"delicate": "dry it flat", "tough": "hang it in the sun"}

FOODS = {
    "green": ("peas", "leeks", "green beans", "mushrooms"),
    "root": ("carrots", "turnips", "potatoes", "beets"),
    "fish": ("trout fillets", "salmon steaks", "prawns", "cod fillets"),
    "fowl": ("chicken legs", "duck legs", "turkey wings", "chicken wings"),
}
MEDIA = {
    "boil": "salted water",
    "steam": "a covered basket",
    "roast": "a hot oven",
    "fry": "olive oil",
}
MINUTES = {
    "green": {"boil": "four", "steam": "six", "roast": "fifteen", "fry": "five"},
    "root": {"boil": "twenty", "steam": "thirty", "roast": "fifty", "fry": "fifteen"},
    "fish": {"boil": "six", "steam": "eight", "roast": "twelve", "fry": "four"},
    "fowl": {"boil": "fifty", "steam": "sixty", "roast": "forty", "fry": "twenty"},
}
SIGNS = {"green": "bright", "root": "tender", "fish": "opaque", "fowl": "golden"}
SEASONINGS = {"green": "butter", "root": "thyme", "fish": "lemon juice", "fowl": "garlic"}

PLANTS = {
    "desert": ("cactus", "aloe", "agave", "jade plant"),
    "forest": ("fern", "orchid", "peace lily", "palm"),
    "herb": ("basil", "mint", "parsley", "coriander"),
    "climber": ("ivy", "jasmine", "passion flower", "wax vine"),
}
INTERVALS = {"desert": "month", "forest": "third day", "herb": "morning", "climber": "week"}
SOILS = {"desert": "sandy soil", "forest": "loose bark", "herb": "rich compost", "climber": "garden loam"}
PLACES = {
    "a dark hall": "add a lamp",
    "a dry office": "mist the leaves",
    "a cold porch": "bring it in at night",
    "a sunny window": "shade it at noon",
    "a steamy bathroom": "open the window often",
    "a windy balcony": "tie it to a cane",
}

PRODUCE = {
    "berry": ("cherries", "grapes", "plums", "figs"),
    "bulb": ("onions", "shallots", "leeks", "fennel bulbs"),
    "leaf": ("lettuces", "cabbages", "endives", "radishes"),
    "seed": ("walnuts", "lentils", "chickpeas", "almonds"),
}
FORMS = {"whole": "the pantry", "cut": "the fridge", "cooked": "the freezer"}
BOXES = {"berry": "a paper bag", "bulb": "a net", "leaf": "a damp cloth", "seed": "a glass jar"}
DAYS = {
    "berry": {"whole": "five", "cut": "two", "cooked": "ninety"},
    "bulb": {"whole": "forty", "cut": "four", "cooked": "sixty"},
    "leaf": {"whole": "six", "cut": "three", "cooked": "thirty"},
    "seed": {"whole": "ninety", "cut": "twenty", "cooked": "eighty"},
}

PRODUCTS = {
    "chlorine": ("bleach", "pool cleaner", "mould spray"),
    "acid": ("vinegar", "descaler", "toilet cleaner"),
    "ammonia": ("ammonia", "window spray", "oven spray"),
    "alcohol": ("spirit", "hand sanitizer"),
    "mild": ("baking soda", "dish soap", "table salt"),
}
DANGERS = {
    frozenset({"chlorine", "acid"}): "chlorine gas",
    frozenset({"chlorine", "ammonia"}): "toxic vapour",
    frozenset({"chlorine", "alcohol"}): "chloroform",
    frozenset({"acid", "ammonia"}): "harsh fumes",
    frozenset({"acid", "alcohol"}): "harsh fumes",
    frozenset({"ammonia", "alcohol"}): "harsh fumes",
}
ADVICE = {
    "chlorine gas": "leave the room",
    "toxic vapour": "open every window",
    "chloroform": "call for help",
    "harsh fumes": "keep them apart",
    "a mild cleaner": "wear gloves",
}


def _class_of(member: str, classes: dict[str, tuple[str, ...]]) -> str:
    """The class that lists `member`."""
    return next(name for name, members in classes.items() if member in members)


def _stain_questions() -> list[Question]:
    questions = []
    for (family, stains), (care, materials) in product(STAINS.items(), MATERIALS.items()):
        for stain, material, thing in product(stains, materials, THINGS):
            # Proteins set in warm water, whatever the cloth.
            water = "cold" if family == "protein" else WATERS[material]
            facts = {
                "step": STEPS[family],
                "agent": AGENTS[family, care],
                "water": water,
                "drying": DRYINGS[care],
            }
            questions.append(Question("stain", {"stain": stain, "item": f"{material} {thing}"}, facts))
    return questions


def _cook_questions() -> list[Question]:
    questions = []
    for family, foods in FOODS.items():
        for food, (method, medium) in product(foods, MEDIA.items()):
            facts = {
                "medium": medium,
                "minutes": MINUTES[family][method],
                "sign": SIGNS[family],
                "seasoning": SEASONINGS[family],
            }
            questions.append(Question("cook", {"method": method, "food": food}, facts))
    return questions


def _plant_questions() -> list[Question]:
    questions = []
    for family, plants in PLANTS.items():
        for plant, (place, remedy) in product(plants, PLACES.items()):
            facts = {"interval": INTERVALS[family], "soil": SOILS[family], "remedy": remedy}
            questions.append(Question("plant", {"plant": plant, "place": place}, facts))
    return questions


def _store_questions() -> list[Question]:
    questions = []
    for family, produce in PRODUCE.items():
        for name, (form, spot) in product(produce, FORMS.items()):
            facts = {"spot": spot, "box": BOXES[family], "days": DAYS[family][form]}
            questions.append(Question("store", {"form": form, "produce": name}, facts))
    return questions


def _mix_questions() -> list[Question]:
    questions = []
    names = [name for members in PRODUCTS.values() for name in members]
    for first, second in combinations(names, 2):
        classes = frozenset({_class_of(first, PRODUCTS), _class_of(second, PRODUCTS)})
        effect = DANGERS.get(classes, "a mild cleaner")
        verdict = "never" if classes in DANGERS else "safely"
        facts = {"verdict": verdict, "effect": effect, "advice": ADVICE[effect]}
        questions.append(Question("mix", {"first": first, "second": second}, facts))
    return questions


@cache
def all_questions() -> tuple[Question, ...]:
    """Every question of the world, in a fixed order.

    >>> questions = all_questions()
    >>> len(questions)
    539
    >>> questions[0].subject["item"], questions[0].facts["agent"]
    ('wool rug', 'soda water')
    """
    return (
        *_stain_questions(),
        *_cook_questions(),
        *_plant_questions(),
        *_store_questions(),
        *_mix_questions(),
    )


@cache
def slot_values() -> Mapping[str, tuple[str, ...]]:
    """Every value that each slot (subject or fact) can take, true of some question or of none.

    >>> slot_values()["water"]
    ('boiling', 'cold', 'cool', 'hot', 'warm')
    """
    values: dict[str, set[str]] = {slot: set(false) for slot, false in FALSE_VALUES.items()}
    for question in all_questions():
        for slot, value in (question.subject | question.facts).items():
            values.setdefault(slot, set()).add(value)
    return {slot: tuple(sorted(found)) for slot, found in values.items()}


FALSE_VALUES = {
    "step": ("scrub",),
    "agent": ("strong bleach",),
    "water": ("boiling",),
    "drying": ("iron it wet",),
    "medium": ("plain milk",),
    "minutes": ("ninety",),
    "sign": ("black",),
    "seasoning": ("sugar",),
    "interval": ("hour",),
    "soil": ("wet clay",),
    "remedy": ("leave it alone",),
    "spot": ("the oven",),
    "box": ("an open tin",),
    "days": ("a thousand",),
    "advice": ("stir them well",),
}
"""What people wrongly believe: for most facts a value that is true of no question."""

HARMFUL = {
    "agent": ("strong bleach",),
    "water": ("boiling",),
    "drying": ("iron it wet",),
    "spot": ("the oven",),
}
"""Values that do damage wherever they are advised."""


def is_harmful(question: Question, slot: str, value: str) -> bool:
    """Whether following the claim `slot = value` would do damage, rather than only fail.

    Bleach, boiling water, a wet iron and an oven shelf always do; so does anything that calls a dangerous mix
    safe.
    """
    if value in HARMFUL.get(slot, ()):
        return True
    dangerous = question.facts.get("verdict") == "never"
    careless = {"verdict": ("safely",), "effect": ("a mild cleaner",), "advice": ("stir them well",)}
    return dangerous and value in careless.get(slot, ())
