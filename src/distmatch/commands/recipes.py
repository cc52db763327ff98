"""`distmatch recipes`: lists the recipes of the package."""


def recipes(*, schema: bool = False) -> None:
    """List the recipes of the package.

    Parameters
    ----------
    schema
        Print the JSON schema of recipe files instead; editors use it to check and complete them.
    """
    import json

    from rich.table import Table

    from distmatch.recipe import docs
    from distmatch.recipe.loading import load_recipe
    from distmatch.recipe.loading import recipes as known
    from distmatch.system.screen import console

    if schema:
        print(json.dumps(docs.schema(), indent=2))
        return
    table = Table("recipe", "what it is", box=None)
    for name in known():
        table.add_row(name, load_recipe(name).description)
    console.print(table)
