"""Numbers on axes are figures, and names in a legend are what they are."""

from recipes.common import plots


def labels_of(monkeypatch, draw):
    """The texts on all axes of the figure that `draw` writes."""
    texts, real = set(), plots.plt.Figure.savefig

    def savefig(figure, *args, **kwargs):
        real(figure, *args, **kwargs)
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            texts.update(axis.get_major_formatter().format_ticks(axis.get_majorticklocs()))
            texts.update(axis.get_minor_formatter().format_ticks(axis.get_minorticklocs()))

    monkeypatch.setattr(plots.plt.Figure, "savefig", savefig)
    draw()
    return texts


def test_a_logarithmic_axis(monkeypatch, tmp_path):
    def draw():
        figure, axes = plots.plt.subplots()
        axes.plot([100, 4000], [300, 90000])
        axes.set(xscale="log", yscale="log")
        plots.save_figure(figure, tmp_path / "x.png")

    labels = labels_of(monkeypatch, draw)
    assert {"100", "1,000", "3,000", "10,000"} <= labels and not any("$" in label for label in labels)


def test_powers_of_two(monkeypatch, tmp_path):
    labels = labels_of(monkeypatch, lambda: plots.plot_curves(tmp_path / "x.png", {"a$b$": [(1, 2), (4096, 5)]}, x="n", y="y", log_x=True))
    assert "4,096" in labels and not any("$" in label for label in labels)


def test_numbers_that_were_chosen_stay(monkeypatch, tmp_path):
    def draw():
        figure, axes = plots.plt.subplots()
        axes.plot([100, 4000], [1, 2])
        axes.set(xscale="log", xticks=[128, 2048])
        plots.save_figure(figure, tmp_path / "x.png")

    assert {"128", "2,048"} <= labels_of(monkeypatch, draw)
