"""The demo's sixteen chats: what people ask, from a line to a page, with the most tokens that each answer may take."""

from __future__ import annotations

from typing import Final

_LETTER = """Dear neighbours, as many of you know the old footbridge behind the mill has been closed since the storm in March. The council has now
had it surveyed, and the news is mixed. The stone piers are sound, and with cleaning and fresh mortar they will last another century. The
timber deck is not: two of the main beams are rotten where the ivy held the damp against them, and the handrail came away in the surveyor's
hand. A new oak deck would cost about eighteen thousand pounds; larch would be eleven thousand but would need replacing within twenty years.
The council can pay nine thousand this year. We propose to raise the rest for oak ourselves: a plant sale on the second Saturday of June,
the summer fair, and a sponsored walk along the river in September. If every household gave forty pounds we would be more than half way.
The blacksmith has offered to make the new handrail for the price of the iron, and the scouts will clear the ivy. Until the work is done,
please do not climb over the barrier, however short the way to the bus stop is: somebody will be hurt. Write to me or speak to Anna at the
shop if you can help. With warm wishes, Tom Aldous"""

_REPORT = """A heat pump moves heat instead of making it. A fluid that boils far below freezing evaporates in a coil outdoors and takes up warmth
from the air, even from cold air. A compressor squeezes the vapour, which makes it hot; indoors it condenses in a second coil and gives that
heat to the house; a valve lets the pressure fall, the fluid is cold again, and the circle begins anew. Because the electricity drives only
the compressor and the fans, one unit of it can bring three or four units of heat indoors. The ratio is called the coefficient of
performance. It falls as the difference between the two temperatures grows: on a mild day with large, lukewarm radiators it may be five, on
a frosty night with small, hot ones barely two. Ice forms on the outdoor coil in damp cold, so now and then the machine runs backwards for a
few minutes to melt it. A well insulated house with big radiators or heated floors is therefore worth more than a larger machine, and an
oversized machine that switches on and off all day wears out early and wastes power at every start."""

_STORY = """The lighthouse keeper had counted ships for thirty-one years. He kept them in ledgers bound in green cloth, one line a ship: the hour,
the rig, the course, and whether anyone had waved. On the first page of the first ledger a boy on a coal barge had waved with both arms, and
the keeper had written it down because there was nothing else to write. After that he always looked for the wave. In the last winter before
the light was made automatic, on a night without wind, he saw a vessel that was in no register: three masts, no lamp, its sails full."""

PROMPTS: Final[tuple[tuple[str, int], ...]] = (
    ("What is the capital of France?", 24),
    ("Write a haiku about the sea in winter.", 40),
    (f"Summarise this letter in two sentences.\n\n{_LETTER}", 80),
    ("Explain what a hash table is to someone who has never programmed.", 140),
    ("Give me three names for a bakery, each with a reason.", 90),
    (f"Using only the text below, why does a heat pump work less well on a frosty night?\n\n{_REPORT}", 90),
    ("Translate into French: Good morning, where is the station?", 32),
    ("Write a Python function that says whether a word is a palindrome.", 130),
    ("What should I pack for a weekend in the mountains in October?", 140),
    (f"Continue this story with one more paragraph.\n\n{_STORY}", 150),
    ("Why is the sky blue? Answer in one short paragraph.", 90),
    ("List the planets from the Sun outwards.", 60),
    (f"Read both texts. Which of them asks its readers to do something, and what?\n\n{_REPORT}\n\n{_LETTER}", 70),
    ("Suggest a vegetarian dinner for four that takes half an hour.", 150),
    (f"Make a list of the costs named in this letter.\n\n{_LETTER}", 70),
    ("Write a polite e-mail that moves a meeting from Tuesday to Thursday.", 120),
)
"""(what the user says, most tokens of the answer)"""
