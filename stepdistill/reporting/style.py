"""The page's style and its one line of script."""

STYLE = """
:root { color-scheme: light dark; --ink: #14181f; --muted: #626b78; --line: #e3e6eb;
  --paper: #f6f7f9; --card: #fff; --bad: #b91c1c; --good: #15803d; --c0: #2f6fde; --c1: #d9480f;
  --c2: #15803d; --c3: #9333ea; --c4: #b45309; --c5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #9aa3af; --line: #2c323b;
  --paper: #101317; --card: #181c22; --bad: #f87171; --good: #4ade80; --c0: #7aa7ff; --c1: #ff8a5c;
  --c2: #5fd38a; --c3: #c793ff; --c4: #f0b35a; --c5: #4fd0e3; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 18px 16px 40px; }
h1 { font-size: 1.5rem; margin: 0 0 2px; }
h2 { font-size: 1.1rem; margin: 30px 0 10px; }
h3 { font-size: .95rem; margin: 0; }
p { margin: 0; }
.sub, .chart p, figcaption span { color: var(--muted); font-size: .85rem; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; color: #fff;
  background: var(--c0); font-size: .8rem; font-weight: 600; vertical-align: middle; }
.badge.finished { background: #15803d; } .badge.interrupted { background: #92400e; }
.badge.stopped, .badge.failed { background: #b91c1c; }
.bar { height: 6px; background: var(--line); border-radius: 3px; margin: 12px 0; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--c0); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(125px, 1fr)); gap: 8px;
  margin: 12px 0 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 7px 10px; min-width: 0; }
dt { color: var(--muted); font-size: .76rem; } dd { margin: 0; font-weight: 600; }
.charts, .grids { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px; min-width: 0; }
figure.best { border-color: var(--good); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--muted); font-size: 12px; } svg .grid { stroke: var(--line); }
svg .mark { stroke: var(--bad); stroke-dasharray: 3 3; opacity: .7; }
svg .level { stroke: var(--muted); stroke-dasharray: 6 4; }
polyline { fill: none; stroke-width: 1.9; stroke-linejoin: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 5px 0 0;
  padding: 0; font-size: .82rem; } .legend b { font-weight: 600; }
.legend li::before { content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 5px;
  border-radius: 2px; background: currentColor; }
""" + "".join(
    f"polyline.c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }} "
    f".legend .c{i} {{ color: var(--c{i}); }}\n"
    for i in range(6)
) + """
.grids img { display: block; width: 100%; height: auto; margin-top: 8px; border-radius: 4px; }
img.tiny { image-rendering: pixelated; }
.alarms { list-style: none; margin: 0; padding: 0; }
.alarms li { background: var(--card); border: 1px solid var(--line); border-left: 4px solid
  var(--bad); border-radius: 6px; padding: 7px 11px; margin-bottom: 7px; }
.why { color: var(--bad); margin-top: 10px; }
details { margin-top: 26px; } summary { cursor: pointer; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; font-size: .78rem; }
"""  # fmt: skip

REFRESH_SECONDS = 20
# Reloading in place keeps where the reader has scrolled to.
REFRESH = f"<script>setTimeout(() => location.reload(), {REFRESH_SECONDS * 1000});</script>"
