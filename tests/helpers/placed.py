"""Maps that say to accelerate where the parts of a model go."""


def device_map(model, blocks, place, rest):
    """{path: place}: `blocks` is the path of the blocks, and `place(k)` where block k goes."""
    found = {}

    def visit(module, at):
        for name, child in module.named_children():
            path = f"{at}.{name}" if at else name
            if path == blocks:
                found.update({f"{path}.{k}": place(k) for k in range(len(child))})
            elif blocks.startswith(f"{path}."):
                visit(child, path)
            else:
                found[path] = rest

    visit(model, "")
    return found
