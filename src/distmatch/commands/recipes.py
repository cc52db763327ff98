"""`distmatch recipes`."""


def recipes(*, schema: bool = False) -> None:
    """List the recipes of the package.

    Parameters
    ----------
    schema
        Print the JSON schema of a recipe file instead, with which an editor checks and completes one.
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
