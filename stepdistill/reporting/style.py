"""One look for every page and picture: the colours, and the pages' style sheet."""

INK, MUTED, LINE, PAPER = "#14181f", "#6b7280", "#e3e6eb", "#ffffff"
GOOD, BAD, OPEN = "#15803d", "#b91c1c", "#b45309"
COLOUR = {"real": "#6b7280", "teacher": "#2f6fde", "student": "#c2410c"}
# Okabe and Ito's palette, told apart by colour-blind readers; for many students in one plot.
CYCLE = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#0072b2", "#444444")

STYLE = """
:root { color-scheme: light dark; --ink: #14181f; --muted: #626a77; --line: #e3e6eb;
  --page: #f6f7f9; --card: #fff; --good: #15803d; --bad: #b91c1c; --open: #b45309;
  --teacher: #2f6fde; --student: #c2410c; --c0: #2f6fde; --c1: #c2410c; --c2: #15803d;
  --c3: #9333ea; --c4: #b45309; --c5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --muted: #9aa3b2; --line: #2b313b;
  --page: #101318; --card: #181c23; --good: #4ade80; --bad: #f87171; --open: #fbbf24;
  --teacher: #7fb0ff; --student: #ff9a62; --c0: #7aa7ff; --c1: #ff8a5c; --c2: #5fd38a;
  --c3: #c793ff; --c4: #f0b35a; --c5: #4fd0e3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 3rem; max-width: 72rem; background: var(--page);
  color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 1.2rem; font-size: clamp(1.35rem, 1rem + 2vw, 2rem); line-height: 1.2; }
h2 { margin: 0 0 .8rem; font-size: 1.05rem; } h3 { margin: 0; font-size: .95rem; }
section { margin: 0 0 1rem; padding: 1.1rem 1.2rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; }
p { margin: .8rem 0 0; color: var(--muted); font-size: .86rem; } figcaption p { margin: 0; }
ul { margin: 0; padding: 0; list-style: none; }
.verdicts li { display: grid; grid-template-columns: 6.2rem 1fr auto; gap: .2rem .8rem;
  padding: .45rem 0; }
li + li { border-top: 1px solid var(--line); }
li em { font-style: normal; color: var(--muted); font-variant-numeric: tabular-nums; }
.good b { color: var(--good); } .bad b, .why { color: var(--bad); } .open b { color: var(--open); }
figure { margin: 0; min-width: 0; } figcaption span { color: var(--muted); font-size: .8rem; }
.strip { display: grid; grid-template-columns: 12rem 1fr; align-items: center; }
.strip + .strip { margin-top: .7rem; } .strip span { display: block; }
.lines { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
img.tiny { image-rendering: pixelated; }
.charts, .grids { display: grid; gap: 1.1rem .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.charts > img { border-radius: 8px; } .grids { margin-top: .8rem; }
.grids img { margin-top: .4rem; }
figure.best { outline: 2px solid var(--good); outline-offset: 4px; border-radius: 4px; }
.real figcaption b, tr.real td:first-child { color: var(--muted); }
.teacher figcaption b, tr.teacher td:first-child { color: var(--teacher); }
.student figcaption b, tr.student td:first-child { color: var(--student); }
tr.failed td { color: var(--bad); white-space: normal; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th { color: var(--muted); font-weight: 500; font-size: .8rem; }
th, td { padding: .45rem .3rem; text-align: right; white-space: nowrap; }
td { border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td:first-child, tr.student td { font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr));
  gap: .7rem 1.2rem; margin: 0; }
dt { color: var(--muted); font-size: .8rem; } dd { margin: 0; }
pre { margin: 0; padding: .9rem 1rem; overflow-x: auto; border-radius: 10px;
  background: var(--page); border: 1px solid var(--line);
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
summary { cursor: pointer; margin-bottom: .6rem; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; color: #fff;
  background: #2f6fde; font-size: .8rem; font-weight: 600; vertical-align: middle; }
.badge.finished { background: #15803d; } .badge.interrupted { background: #92400e; }
.badge.stopped { background: #b91c1c; } .badge.failed { background: #b91c1c; }
.bar { height: 6px; margin: .8rem 0; border-radius: 3px; overflow: hidden;
  background: var(--line); }
.bar i { display: block; height: 100%; background: var(--c0); }
.alarms li { padding: .4rem .7rem; border-left: 4px solid var(--bad); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--muted); font-size: 12px; } svg .grid { stroke: var(--line); }
svg .mark { stroke: var(--bad); stroke-dasharray: 3 3; opacity: .7; }
svg .level { stroke: var(--muted); stroke-dasharray: 6 4; }
polyline { fill: none; stroke-width: 1.9; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 5px; font-size: .82rem; }
.legend li { border: 0; }
.legend li::before { content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 5px;
  border-radius: 2px; background: currentColor; }
@media (max-width: 46rem) {
  body { padding-top: 1.2rem; }
  .strip { grid-template-columns: 1fr; gap: .3rem; } .lines { grid-template-columns: 1fr; }
  .strip figcaption { display: flex; justify-content: space-between; align-items: baseline; }
  .verdicts li { grid-template-columns: auto 1fr; } li em { text-align: right; }
  .verdicts span { grid-column: 1 / -1; grid-row: 2; }
  thead { display: none; }
  tr { display: block; padding: .6rem 0; border-top: 1px solid var(--line); }
  tr:first-child { border-top: 0; padding-top: 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .12rem 0; border: 0;
    white-space: normal; }
  td::before { content: attr(data-name); color: var(--muted); font-weight: 400; }
  td:empty { display: none; } td:first-child { font-size: 1rem; }
  td:first-child::before { content: none; }
}
""" + "".join(
    f"polyline.c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }} "
    f".legend .c{i} {{ color: var(--c{i}); }}\n"
    for i in range(6)
)  # fmt: skip
