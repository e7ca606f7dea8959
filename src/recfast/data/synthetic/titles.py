"""The words of an invented bookshop: genres, their topics, publishers, places, and titles made of them.

A title is drawn from the vocabulary of the item's genre and topic and from the places its publisher writes
about, so that text alone carries the larger part of an item's taste vector.
"""

from __future__ import annotations

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


# genre -> four topics, each (adjectives, nouns)
_VOCABULARY: dict[str, tuple[tuple[str, str], ...]] = {
    "Mystery": (
        ("Silent Crooked Velvet", "Detective Alibi Witness Inheritance Locksmith"),
        ("Foggy Gaslit Vanished", "Constable Coachman Lodger Pawnbroker Ledger"),
        ("Poisoned Country Genteel", "Vicar Teapot Rosebush Housekeeper Weekend"),
        ("Forged Stolen Numbered", "Masterpiece Cipher Auction Curator Portrait"),
    ),
    "Fantasy": (
        ("Dragonborn Ember Scaled", "Dragon Hoard Rider Wyrm Roost"),
        ("Whispering Rune Moonlit", "Sorcerer Grimoire Familiar Spell Apprentice"),
        ("Elder Thorned Hollow", "Forest Stag Dryad Grove Changeling"),
        ("Iron Shattered Exiled", "Crown Throne Oathkeeper Banner Siege"),
    ),
    "Space": (
        ("Drifting Stellar Distant", "Starship Navigator Colony Nebula Beacon"),
        ("Sentient Chrome Recursive", "Android Circuit Algorithm Replica Signal"),
        ("Red Terraformed Airless", "Settler Crater Dome Rover Horizon"),
        ("Forbidden Orbital Galactic", "Armada Treaty Smuggler Empire Blockade"),
    ),
    "Romance": (
        ("Tender Unsent Summer", "Letter Promise Sweetheart Proposal Keepsake"),
        ("Scandalous Regency Masked", "Duke Ballroom Governess Waltz Heiress"),
        ("Seaside Sunlit Barefoot", "Lighthouse Bakery Cottage Harbor Ferry"),
        ("Snowbound Mistletoe Second", "Chance Cabin Mitten Carol Fireplace"),
    ),
    "Horror": (
        ("Haunted Weeping Boarded", "Mansion Nursery Cellar Seance Staircase"),
        ("Hungry Rotting Feral", "Harvest Marrow Swarm Scarecrow Hollow"),
        ("Drowned Nameless Abyssal", "Cult Idol Tide Fisherman Bell"),
        ("Bloodless Undying Crimson", "Vampire Coffin Thirst Countess Crypt"),
    ),
    "Adventure": (
        ("Sunken Stormy Mutinous", "Privateer Galleon Cutlass Treasure Lagoon"),
        ("Frozen Uncharted Polar", "Expedition Sledge Glacier Icebreaker Summit"),
        ("Buried Jungle Golden", "Temple Relic Explorer Map Idol"),
        ("Dusty Lawless Outlaw", "Marshal Canyon Mustang Saloon Railroad"),
    ),
    "History": (
        ("Roman Marble Imperial", "Legion Senate Aqueduct Emperor Gladiator"),
        ("Medieval Plague Cloistered", "Abbey Knight Manuscript Guild Pilgrim"),
        ("Wartime Secret Occupied", "Codebreaker Airman Resistance Convoy Telegram"),
        ("Silk Ancient Desert", "Caravan Dynasty Merchant Oasis Scroll"),
    ),
    "Cooking": (
        ("Rustic Crusty Slow", "Sourdough Oven Loaf Hearth Flour"),
        ("Saffron Smoky Spiced", "Curry Bazaar Tandoor Cardamom Lentil"),
        ("Green Garden Raw", "Radish Orchard Pickle Salad Bean"),
        ("Sweet Buttery Candied", "Pastry Caramel Chocolate Meringue Tart"),
    ),
    "Nature": (
        ("Feathered Migrating Wild", "Heron Falcon Songbird Marsh Nest"),
        ("Mossy Rooted Ancient", "Oak Fern Mushroom Woodland Badger"),
        ("Tidal Salt Coral", "Whale Reef Otter Shoreline Octopus"),
        ("Blooming Walled Untidy", "Gardener Rose Meadow Beehive Hedge"),
    ),
    "Science": (
        ("Quantum Curious Elegant", "Particle Equation Theorem Symmetry Paradox"),
        ("Wired Dreaming Restless", "Brain Neuron Memory Synapse Habit"),
        ("Expanding Dark Luminous", "Universe Telescope Galaxy Comet Eclipse"),
        ("Selfish Tangled Living", "Genome Microbe Fossil Evolution Cell"),
    ),
    "Travel": (
        ("Slow Overnight Scenic", "Train Railway Platform Timetable Carriage"),
        ("Mountain Windy Winding", "Footpath Rucksack Pass Shepherd Hut"),
        ("Island Turquoise Lazy", "Sailboat Cove Archipelago Hammock Port"),
        ("Crowded Neon Rainy", "City Market Alley Rooftop Tram"),
    ),
    "Music": (
        ("Midnight Smoky Brass", "Saxophone Quartet Trumpet Bandleader Nightclub"),
        ("Electric Loud Runaway", "Guitar Roadie Encore Amplifier Setlist"),
        ("Grand Unfinished Baroque", "Symphony Cello Sonata Conductor Fugue"),
        ("Vinyl Humming Analog", "Synthesizer Record Groove Remix Turntable"),
    ),
}

GENRES: tuple[str, ...] = tuple(_VOCABULARY)
TOPICS = 4
"""Topics in each genre."""

_TOPICS = tuple(
    tuple((adjectives.split(), nouns.split()) for adjectives, nouns in topics) for topics in _VOCABULARY.values()
)

_HOUSES = _words(
    """
    Fernhill Northlight Hartwood Lanternfish Marlowe Quillfeather Bellwether Stonecrop Larkspur Kestrel
    Foxglove Tidewater Copperfield Nightjar Saltmarsh Juniper Hawthorn Millrace Brightwell Cinderford
    Elmhurst Gullwing Ravenscar Sorrel
    """
)
PUBLISHERS: tuple[str, ...] = tuple(f"{house} {kind}" for kind in ("Press", "Books") for house in _HOUSES)

_PLACES: tuple[str, ...] = tuple(
    start + end
    for end in ("wick", "mere", "ford", "haven")
    for start in _words(
        """
        Ash Briar Cold Dun Elder Fair Glen Hazel Ivy Kings Lark Mar Nether Oaken Penn Quern Rose Salt Thorn
        Under Vale Wind Yar Wolds
        """
    )
)
PLACES_PER_PUBLISHER = len(_PLACES) // len(PUBLISHERS)

PRICE_BUCKETS = "under 5", "5-8", "8-12", "12-18", "18-30", "over 30"
PRICE_EDGES = 5.0, 8.0, 12.0, 18.0, 30.0
AGE_BANDS = "under 18", "18-24", "25-34", "35-44", "45-59", "60+"
CITIES: tuple[str, ...] = tuple(
    start + end for end in ("ton", "bridge", "field") for start in _words("Amber Barn Clay Dray Ever Farn Gold Hex")
)
DEVICES = "phone", "desktop", "tablet", "tv"
SCENARIOS = "home", "search", "category", "push"

_PATTERNS = (
    "The {a} {n}",
    "The {n} of {p}",
    "{art} {n} in {p}",
    "The {n} and the {m}",
    "The {n}, the {m}",
    "{n} of the {a} {m}",
    "Beyond the {a} {n}",
    "The {a} {n} of {p}",
    "Return to the {a} {n}",
    "{a} {n}, {b} {m}",
)


def make_titles(genre: np.ndarray, topic: np.ndarray, publisher: np.ndarray, draws: np.ndarray) -> list[str]:
    """Titles of 3 to 7 words.

    Parameters
    ----------
    genre, topic, publisher : int [N]
        Positions in `GENRES`, in the genre's topics, and in `PUBLISHERS`.
    draws : uint32 [N, 6]
        Random words: pattern, first and second adjective, first and second noun, place.

    Returns
    -------
    list of str
        All different: a title that was given out before becomes "..., Book 2", "..., Book 3", and so on.
    """
    titles, given = [], {}
    rows = zip(genre.tolist(), topic.tolist(), publisher.tolist(), draws.tolist(), strict=True)
    for g, t, brand, (pattern, first, second, noun, other, where) in rows:
        adjectives, nouns = _TOPICS[g][t]
        a, n = first % len(adjectives), noun % len(nouns)
        # offsets from 1 on, so that one title never says a word twice
        b = (a + 1 + second % (len(adjectives) - 1)) % len(adjectives)
        m = (n + 1 + other % (len(nouns) - 1)) % len(nouns)
        title = _PATTERNS[pattern % len(_PATTERNS)].format(
            a=adjectives[a],
            b=adjectives[b],
            n=nouns[n],
            m=nouns[m],
            p=_PLACES[brand * PLACES_PER_PUBLISHER + where % PLACES_PER_PUBLISHER],
            art="An" if nouns[n][0] in "AEIO" else "A",
        )
        volume = given[title] = given.get(title, 0) + 1
        titles.append(title if volume == 1 else f"{title}, Book {volume}")
    return titles
