"""Products for worlds/webshop.py, generated in the format of WebShop's files.

A warm start in --cache_dir is kept by webshop.py's source: after a change here, remove it.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Shelf:
    """What products of a category are drawn from; words are separated by commas."""

    category: str
    department: str
    nouns: str
    attributes: str
    options: tuple[tuple[str, str], ...]  # (name, values)


@dataclass(frozen=True)
class Stock:
    """What a shop holds."""

    shelves: tuple[Shelf, ...]
    products: int
    attributes: int  # of a product
    orders: int  # instructions for a product
    digits: int  # of its code
    brands: bool


FULL_SHELVES = (
    Shelf(
        category="beauty",
        department="Beauty & Personal Care › Hair Care",
        nouns="shampoo,conditioner,lotion,mascara,perfume",
        attributes="cruelty free,sulfate free,paraben free,long lasting,tea tree,sensitive skin",
        options=(
            ("size", "3 ounce,8 ounce,16 ounce,32 ounce"),
            ("scent", "lavender,vanilla,citrus,unscented"),
        ),
    ),
    Shelf(
        category="fashion",
        department="Clothing, Shoes & Jewelry › Men",
        nouns="sneakers,sweatshirt,jeans,jacket,sandals",
        attributes="machine wash,slim fit,long sleeve,rubber sole,memory foam,water resistant",
        options=(
            ("color", "black,white,navy,red,olive,grey"),
            ("size", "small,medium,large,x-large,xx-large"),
        ),
    ),
    Shelf(
        category="electronics",
        department="Electronics › Accessories & Supplies",
        nouns="headphones,speaker,charger,tripod,keyboard",
        attributes="fast charging,noise cancelling,high definition,carbon fiber,hands free",
        options=(("color", "black,white,blue,pink"), ("style", "single,2-pack,bundle")),
    ),
    Shelf(
        category="grocery",
        department="Grocery & Gourmet Food › Snack Foods",
        nouns="chocolate,granola,coffee,crackers,popcorn",
        attributes="gluten free,sugar free,low sodium,non gmo,dairy free,high protein",
        options=(
            ("flavor", "original,honey,caramel,sea salt"),
            ("size", "4 ounce (pack of 1),4 ounce (pack of 6),1 pound"),
        ),
    ),
    Shelf(
        category="garden",
        department="Home & Kitchen › Furniture",
        nouns="ottoman,lamp,bookshelf,nightstand,stool",
        attributes="space saving,solid wood,easy clean,easy assemble,mid century,faux leather",
        options=(("color", "walnut,ivory,teal,charcoal"), ("size", "small,medium,large")),
    ),
)
CORNER_SHELVES = (
    Shelf(
        category="kitchen",
        department="Home & Kitchen › Dining",
        nouns="mug,bowl,tray,jar",
        attributes="handmade,foldable,washable,light",
        options=(("color", "red,blue,black,white"),),
    ),
    Shelf(
        category="fashion",
        department="Clothing › Accessories",
        nouns="belt,scarf,hat,wallet",
        attributes="leather,cotton,washable,warm",
        options=(("size", "small,medium,large"),),
    ),
)
FULL_STOCK = Stock(FULL_SHELVES, products=1000, attributes=4, orders=3, digits=9, brands=True)
CORNER_STOCK = Stock(CORNER_SHELVES, products=96, attributes=1, orders=12, digits=2, brands=False)
SYLLABLES = "ka lo mi ter zen vu ra do".split()


def generate(stock):
    """What the files hold, the same each time: (rows, attributes by ASIN, instructions by ASIN)."""
    rng = random.Random("shop")
    rows = []
    attributes = {}
    orders = {}
    for number in range(stock.products):
        shelf = stock.shelves[number % len(stock.shelves)]
        noun = rng.choice(shelf.nouns.split(","))
        has = rng.sample(shelf.attributes.split(","), stock.attributes)
        options = {name: some(values.split(","), rng) for name, values in shelf.options}
        brand = "".join(rng.choices(SYLLABLES, k=3)) if stock.brands else ""
        row = product_row(shelf, noun, has, options, brand, price=rng.randint(5, 60))
        row["asin"] = f"B{number:0{stock.digits}}"
        rows.append(row)
        attributes[row["asin"]] = {"attributes": has}
        orders[row["asin"]] = [order(noun, has, options, rng) for _ in range(stock.orders)]
    return rows, attributes, orders


def some(values, rng):
    """Two or more of them, in random order."""
    return rng.sample(values, rng.randint(2, len(values)))


def product_row(shelf, noun, has, options, brand, price):
    """A row without its code. The title names the first attribute; further pages name the others"""
    shown, *others = has
    bullets = others[:1] or has
    described = [shown, *others[1:]]
    contents = {
        name: [{"value": value, "image": None} for value in values]
        for name, values in options.items()
    }
    return {
        "name": f"{brand} {shown} {noun}".title().strip(),
        "category": shelf.category,
        "query": noun,
        "product_category": f"{shelf.department} › {noun.title()}",
        "pricing": f"${price}.0",
        "full_description": f"A {noun}: {', '.join(described)}.",
        "small_description": [f"It is {attribute}." for attribute in bullets],
        "customization_options": contents,
        "images": [""],
    }


def order(noun, has, options, rng):
    """An instruction for one or two attributes and a value of each option."""
    attributes = rng.sample(has, rng.randint(1, min(2, len(has))))
    values = [rng.choice(values) for values in options.values()]
    wishes = f"that is {' and '.join(attributes)}, in {' and '.join(values)}"
    return {
        "instruction": f"i am looking for a {noun} {wishes}.",
        "instruction_attributes": attributes,
        "instruction_options": values,
    }
