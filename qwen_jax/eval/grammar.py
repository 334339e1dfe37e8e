"""Words and sentences with slots, from which `text` makes prose.

Slots in braces are filled with a random alternative of that name. All is in the past tense, so that
every subject agrees with every verb. There is no digit in it: numbers belong to needles.
"""

SENTENCES = """
{when}, {person} {moved} {from_to} with {load}, and {reaction}.
{person}, {role}, {sold} {load} to {person} {where}, because {reason}.
The {weather} {blew} {across} the {land} {near} {place} {while_}, so {consequence}.
{when}, the {building} {near} {place} {was_changed} by {person}, {role}.
{person} {said} that {rumour}, although {doubt}.
{while_}, {person} and {person} {worked} {where}, and {reaction}.
Nobody {near} {place} {remembered} why {rumour}, but {person} {said} that {reason}.
The {quality} {creature} that {person} {kept} {where} {behaved} {when_later}.
{load} {arrived} {where} {when_later}, and {person} {worked} until {end}.
{person} showed {person} how to {craft}, since {reason}.
When {person} {moved} {from_to}, {consequence}, and {end}.
{where}, {person} found {load} beside a {quality} {thing}, yet {doubt}.
It was {quality} {where}, and {person} {behaved} {when_later} as if {rumour}.
According to {person}, {role}, {rumour}, which meant that {consequence}.
The {thing} in the {building} {near} {place} was {quality}, so {person} {asked} {person} to {craft}.
{person} asked {person}, {role}, whether {rumour}.
In a letter to {person}, {person} {said} that the {weather} {blew} {across} the {land} and {end}.
For the sake of {load}, {person} {moved} {from_to} {when_later}.
{person} dreamed of a {quality} {creature}, a {thing} and {load}, and {when_later} {reaction}.
Between the {building} and the {land}, {person} {planted} {plant} for {person}, because {reason}.
The {plant} {near} {place} {grew} {while_}, and {person} {said} that {consequence}.
A {quality} {thing} and a {quality} {creature} were all that {person}, {role}, {kept} {where}.
{person} painted the {land} {near} {place} with a {quality} {creature} in it, and {reaction}.
After supper {where}, {person} {said} to {person} that {reason}.
The bells of {place} {rang} {when_later}, and {person}, {role}, {worked} {where}.
"""

# Alternatives are separated by bars, or where there are none by white space.
SLOTS = {
    "person": "{given} {family}|{given} {family}|{given} {family}|old {given} {family}|{given}",
    "given": """
Agnes Albert Alma Anselm Astrid Barnaby Beatrice Bertram Cecily Clement Constance Cyril Dagmar
Dorothy Edgar Edith Elias Elspeth Emeric Esther Felix Florence Fergus Gideon Greta Gustav Hannah
Harriet Hector Ida Ignatius Imogen Ingrid Isidore Jasper Joanna Josiah Judith Konrad Lavinia
Leopold Lionel Lucinda Mabel Magnus Marianne Matilda Maurice Miriam Mortimer Nathaniel Nora
Octavia Oswald Ottilie Percival Philippa Prudence Quentin Rosalind Rupert Sabine Silas Sybil
Tabitha Theodore Ursula Valentine Viola Walburga Wilfred Winifred Yvette Zacharias
""",
    "family": """
Abernathy Ainsley Barrow Beckett Birch Blackwood Bramble Calloway Carver Chandler Cobb Cooper
Crane Cutler Dalton Draper Dunmore Ellery Fairfax Farrow Fenwick Fletcher Garland Gately Glover
Greaves Hale Harker Hawthorn Holloway Ives Keating Kettle Lambert Larkin Locke Mallory Marlow
Mercer Moss Nettle Oakes Orchard Palmer Penrose Pike Quill Radley Ravens Rowan Sadler Sorrel
Stroud Tanner Thackeray Tully Underhill Vance Wainwright Weaver Whitlock Wren Yarrow
""",
    "place": """
Alderbrook Amberley Ashcombe Birkdale Blythe Brackenford Bramhope Caldmoor Carrow Chalkwell
Coldharbour Dunfold Eastmere Elmstead Fallowfield Fernhurst Foxcote Glanton Greywater Hallowick
Harrowgate Hazelmere Ironbridge Kelmscot Kingsbarrow Langmoor Larkhill Linden Lowmarsh Maplewick
Millbeck Netherby Northwold Oakhanger Otterbourne Pendle Quarrydale Ravenscar Redcliff Rushden
Saltmarsh Sandwell Sedgebrook Silverdale Stonehythe Swanmore Thistledown Tideswell Underbank
Wexcombe Whitestone Willowbank Winterbourne Wolverdale Yewtree
""",
    "role": """
a {trade} from {place}|the {trade} of {place}|a {quality} {trade}|once a {trade} {near} {place}
|a cousin of the {trade} {near} {place}|by birth a {trade}
""",
    "trade": """
baker|barber|beekeeper|blacksmith|bookbinder|brewer|butcher|carpenter|cartographer|clerk
|clockmaker|cobbler|cooper|doctor|dyer|farmer|ferryman|fisher|gardener|glazier|goldsmith
|harbour master|innkeeper|judge|librarian|mason|midwife|miller|miner|musician|notary|painter|poet
|potter|printer|ropemaker|sailmaker|schoolteacher|shepherd|tailor|tinker|toll keeper|weaver
|wheelwright
""",
    "when": """
One {season} {daytime}|Late in the {season}|Early that {daytime}
|On the {daytime} of the fair in {place}|Shortly before the {daytime}|Long after the {season}
|During a {quality} {daytime}|Towards the end of the {season}|Against all advice
|Year after year in the {season}|On a {quality} {season} {daytime}
""",
    "when_later": """
every {daytime}|until the {season}|before the {daytime} was over|all through the {season}
|on the same {daytime}|in the following {season}|from the {daytime} onwards|now and then
|without a word|for the rest of the {season}|at the wrong moment|long before {person} came
""",
    "season": "spring|summer|autumn|winter|harvest|thaw|frost|drought",
    "daytime": "morning|noon|afternoon|evening|night|dawn|dusk|market day|holiday|day of rest",
    "moved": """
walked|travelled|rode|hurried|wandered|returned|drifted|fled|sailed|set out|strolled|limped
|marched|was sent|crept|went alone
""",
    "from_to": """
from {place} to {place}|over the {land} to {place}|past the {building} {near} {place}
|through {place} towards the {land}|as far as the {building} of {place}
|back to the {land} {near} {place}
""",
    "near": "near|outside|behind|beyond|below|above|not far from|on the road to|a mile from",
    "where": """
in the {building} of {place}|at the edge of the {land} {near} {place}
|behind the {building} {near} {place}|under the {plant} of {place}|on the way to {place}
|in the cellar of the {building} {near} {place}|among the {plant} {near} {place}
|at the market of {place}|in a {quality} room in {place}
""",
    "building": """
abbey|almshouse|barn|bakery|bathhouse|boathouse|brewery|chapel|customs house|dairy|forge|foundry
|granary|greenhouse|inn|library|lighthouse|mill|observatory|parsonage|post office|school|stable
|tannery|theatre|town hall|warehouse|watchtower|windmill|workshop
""",
    "land": """
bay|bog|canal|cliffs|common|delta|downs|estuary|fells|fen|ford|forest|glen|gorge|heath|hills
|lagoon|lake|marsh|meadows|moor|orchards|pass|pastures|plain|quarry|ridge|river|shore|valley
|vineyards|woods
""",
    "weather": """
cold wind|drizzle|dry wind|fine rain|fog|gale|hail|heavy rain|heavy snow|low cloud|mild breeze
|mist|sea wind|sleet|snowstorm|squall|storm|thunder|warm rain|whirlwind
""",
    "blew": "crept|drifted|hung|lingered|passed|poured|rolled|rushed|settled|spread|swept|turned",
    "across": "across|along|around|down|into|over|past|through|towards|up from",
    "load": """
{measure} of {goods}|{measure} of {quality} {goods}|{measure} of {goods} and {measure} of {goods}
|{measure} of {goods} from {place}
""",
    "measure": """
a barrel|a basket|a boatload|a box|a bundle|a cart|a chest|a crate|a handful|a jar|a load|a pile
|a pot|a sack|a tray|a wagon|half a barrel|several baskets|some bags|two sacks|three crates
|a dozen boxes
""",
    "goods": """
almonds|amber|apples|barley|beans|beeswax|books|brass|bread|bricks|butter|candles|charcoal|cheese
|chestnuts|cider|clay|cloth|coal|coffee|copper|cotton|feathers|figs|flax|flour|glass|grapes|hay
|herbs|herring|hides|honey|hops|indigo|lace|lamp oil|leather|lemons|lentils|linen|malt|mushrooms
|mustard|nails|oats|olives|onions|paper|peat|pepper|plums|pottery|raisins|rope|rye|saffron|salt
|seed|silk|slate|soap|spices|tallow|tar|tea|timber|tin|turnips|vinegar|walnuts|wax|wheat|wine|wool
|yarn
""",
    "quality": """
bright|broken|brown|calm|careful|cheap|cheerful|clever|clumsy|cold|crooked|curious|damp|dark|dusty
|empty|faded|famous|fine|forgotten|friendly|gentle|golden|grand|green|grey|heavy|hidden|humble
|idle|large|late|lonely|lost|lucky|modest|muddy|narrow|neat|noisy|patient|plain|polite|proud|quiet
|rare|red|restless|round|rough|rusty|sad|secret|shabby|sharp|silent|silver|simple|sleepy|slow
|small|smooth|solemn|steep|strange|stubborn|sturdy|tall|tame|thin|timid|tired|warm|weary|white
|wild|wise|wooden|worn|young
""",
    "creature": """
badger|bear|blackbird|bull|carp|cat|cow|crab|crow|deer|dog|donkey|duck|eagle|falcon|ferret|fox
|frog|goat|goose|hare|hawk|hedgehog|heron|horse|jackdaw|lamb|lynx|mare|mole|mouse|mule|otter|owl
|ox|parrot|pheasant|pig|pigeon|pony|rabbit|raven|robin|rooster|seal|sparrow|squirrel|stork|swan
|toad|tortoise|trout|wolf
""",
    "plant": """
alders|apple trees|ash trees|beeches|birches|blackberries|cherry trees|clover|cypresses|elms|ferns
|fir trees|foxgloves|hazels|heather|hollies|ivy|larches|lavender|lilacs|lime trees|mulberries
|nettles|oaks|pear trees|pines|poplars|poppies|roses|rowans|sunflowers|thistles|thyme|violets
|walnut trees|willows
""",
    "thing": """
anchor|anvil|banner|basin|bell|bench|blanket|bottle|broom|bucket|cabinet|candlestick|chair
|chessboard|clock|coat|compass|cradle|cup|curtain|desk|door|drum|fiddle|flute|fountain|gate|globe
|hammer|harp|helmet|kettle|key|ladder|lamp|lantern|letter|loom|map|mask|mirror|oar|oven|painting
|pipe|plough|portrait|purse|ring|rug|saddle|scythe|shawl|shovel|sign|sledge|spoon|statue|stove
|sundial|table|tapestry|telescope|tent|trumpet|trunk|umbrella|vase|violin|wheelbarrow|whistle
|window
""",
    "sold": """
gave|lent|lost|offered|owed|promised|sent|showed|sold|handed|brought|delivered|returned
""",
    "was_changed": """
was abandoned|was admired|was bought|was built|was cleaned|was closed|was drawn|was inherited
|was lit|was measured|was mended|was named|was opened|was painted|was rebuilt|was rented|was sold
|was searched|was swept|was visited|was watched
""",
    "said": """
admitted|agreed|announced|argued|believed|claimed|complained|declared|denied|explained|feared
|guessed|hinted|insisted|knew|maintained|mentioned|noticed|promised|proved|remarked|repeated|swore
|thought|whispered|wrote
""",
    "asked": "asked|begged|hired|invited|ordered|persuaded|reminded|told|urged|warned",
    "remembered": "could say|explained|knew|recalled|remembered|understood|wondered",
    "worked": """
argued about {goods}|baked bread|carved a {thing}|counted {goods}|cut {goods}|danced
|drew a {creature}|fed the {creature}|fished|gathered {goods}|looked for a {thing}|made {goods}
|mended a {thing}|packed {goods}|played the {instrument}|polished the {thing}|read aloud
|repaired the {thing}|sang|slept|sorted {goods}|studied the stars|talked about {goods}
|told stories about a {creature}|waited for {person}|washed {goods}|weighed {goods}|wrote letters
""",
    "instrument": """
bagpipes|cello|drum|fiddle|flute|guitar|harp|horn|lute|organ|piano|trumpet|violin
""",
    "kept": """
bought|carried|caught|drew|fed|found|hid|kept|loved|missed|raised|saw|stole|trained|tamed
""",
    "behaved": """
danced|fell asleep|grew thin|hid|kept still|listened|looked up|made a noise|ran away
|refused to move|sang|shivered|sighed|stared at the {thing}|stood by the {thing}|turned round
|vanished|waited|woke up
""",
    "arrived": """
arrived|came to light|changed hands|disappeared|lay|rotted|stood|turned up|was weighed|went
""",
    "craft": """
bake with {goods}|build a {thing}|carve a {thing}|catch a {creature}|clean a {thing}|count {goods}
|cure a {creature}|draw a {creature}|find {plant}|grow {plant}|hide a {thing}|mend a {thing}
|paint a {thing}|play the {instrument}|read a map|sell {goods}|store {goods}|tame a {creature}
|trade in {goods}|weave {goods}|weigh {goods}
""",
    "planted": "cut|planted|pruned|watered|searched|sketched|sold|counted|cleared|tended",
    "grew": "bloomed|died|faded|grew|ripened|smelled sweet|spread|stood|turned {quality}|withered",
    "rang": "rang|fell silent|were rung|were heard|were out of tune|sounded {quality}",
    "reaction": """
the {trade} of {place} laughed|nobody asked about the {thing}|the {creature} followed
|{person} wrote it down|the {trade} shook hands with {person}|the {building} stayed {quality}
|that was the end of the {season}|a {quality} {creature} watched from the {building}
|the children of {place} sang|{person} paid for the {goods}|{person} was {quality} ever after
|the {thing} stayed behind
""",
    "reason": """
the {goods} were {quality}|the {land} {near} {place} was flooded
|the price of {goods} had fallen in {place}|the {building} needed a {quality} {thing}
|the {trade} wanted {goods}|the {creature} had eaten the {goods}|there was no {thing} in {place}
|{person} had asked for {goods}|the {weather} had spoiled the {goods}
|the {season} had been {quality}|a {quality} {trade} could not be trusted
""",
    "rumour": """
the {trade} of {place} hid {goods} in the {building}
|a {creature} lived in the {building} {near} {place}|the {thing} of {place} had been stolen
|the {land} had once been {quality}|{person} would marry the {trade} of {place}
|{place} was older than the {building}|the {weather} came from {place}
|{goods} and {goods} never travelled together|{person} owned the {building} {near} {place}
|the {trade} spoke to the {creature}
""",
    "doubt": """
the {trade} doubted it|few people in {place} agreed|{person} had never seen a {creature}
|the {building} was empty|the {thing} told another story|no {trade} would confirm it
|{person} and {person} were not so sure|the {creature} was never found
|the letters from {place} were lost
""",
    "while_": """
all {season}|for most of the {season}|while {person} slept|while the {goods} dried
|before the {daytime}|as {person} {worked}|while the {trade} was away in {place}
|one {daytime} in the {season}|after the {building} burned|when the {creature} had gone
""",
    "consequence": """
the {trade} closed the {building}|the {goods} stayed {where}|{person} lit a {thing}
|the boats stayed in {place}|the price of {goods} rose|the {creature} came indoors
|{person} had to buy {goods}|the {thing} was hung in the {building}|nobody went to {place}
|the road to {place} was closed|the {trade} went home
""",
    "end": """
the {daytime} came|the {goods} were gone|the {trade} called for {person}|the {thing} broke
|the {creature} fell asleep|the lamps of {place} went out|the {weather} was over
|nothing was left but {goods}|{person} lost the {thing}|the {building} was {quality} again
""",
}
