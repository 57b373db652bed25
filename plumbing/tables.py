"""Tables as text."""


def markdown_table(rows):
    """Rows of cells, the header first -> a Markdown table whose columns are aligned, to be read as plain text, too."""
    widths = []
    for column in zip(*rows):
        widths.append(max(len(cell) for cell in column))
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|".join("-" * (width + 2) for width in widths)
    lines.insert(1, f"|{rule}|")
    return "\n".join(lines) + "\n"
