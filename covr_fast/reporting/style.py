"""How the page looks, in light and dark, from a phone's width on."""

CSS = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --paper: #f5f6f8; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --accent: #0072b2;
  --mark: #a14a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #101317; --card: #181c22; --ink: #e6e9ed;
  --soft: #9aa4af; --line: #343b44; --accent: #56b4e9; --mark: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--font);
  overflow-wrap: break-word; }
main { max-width: 1180px; margin: 0 auto; padding: 0 16px 48px; }
header { padding: 36px 0 8px; }
h1 { margin: 0 0 8px; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 6px; font-size: 1.3rem; line-height: 1.3; }
h3 { margin: 22px 0 6px; font-size: 1.05rem; }
p { margin: 6px 0; max-width: 78ch; }
a { color: var(--accent); }
.lede { font-size: 1.08rem; }
.note, figcaption { color: var(--soft); font-size: 0.86rem; }
.mark { color: var(--mark); }
nav { position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line);
  margin: 8px -16px 0; padding: 8px 16px; overflow-x: auto; white-space: nowrap; }
nav a { margin-right: 16px; font-size: 0.88rem; text-decoration: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 18px 0 0;
  padding: 18px 20px 20px; scroll-margin-top: 52px; min-width: 0; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px 20px;
  margin: 14px 0; }
dl.facts dt { color: var(--soft); font-size: 0.8rem; }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.grid { display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px 22px; }
.grid.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.grid.wide svg { max-width: 760px; }
figure { margin: 8px 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 620px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0; padding: 0; list-style: none;
  font-size: 0.9rem; }
.legend li { min-width: 0; }
.legend svg { width: 26px; height: 10px; margin-right: 6px; vertical-align: middle; }
figure.table { margin: 12px 0; }
.scroll { overflow-x: auto; margin: 4px 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; min-width: 8.5rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.absent, th.absent { color: var(--soft); font-weight: 400; opacity: 0.75; }
td.remark { color: var(--mark); font-size: 0.84rem; }
.shares { display: flex; width: 100%; min-width: 180px; height: 16px; border-radius: 4px; overflow: hidden; }
.shares span { display: block; height: 100%; }
.frames { display: flex; flex-wrap: wrap; gap: 10px; margin: 6px 0 12px; }
.frames figure { margin: 0; width: 104px; }
.frames img { display: block; width: 104px; height: auto; image-rendering: pixelated; border-radius: 4px; }
.frames .kept img { outline: 3px solid #009e73; }
.frames .dropped img { outline: 3px solid #d55e00; }
.frames figcaption { padding-top: 6px; font-size: 0.76rem; line-height: 1.3; }
@media (max-width: 600px) { .frames figure, .frames img { width: 68px; } }
video, .clip { display: block; width: 100%; max-width: 380px; border-radius: 8px; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--accent); font-size: 0.92rem; }
code { font: 0.84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 0.86rem; padding: 18px 0; }
"""
