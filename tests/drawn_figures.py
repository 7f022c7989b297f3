"""What tests of several folders ask of every picture."""


def drawn(figure):
    """The figure, laid out; everything that is drawn stands inside it."""
    figure.canvas.draw()
    box, room = figure.get_tightbbox(), figure.get_size_inches()  # inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= room[0] and box.y1 <= room[1], (box, room)
    return figure
