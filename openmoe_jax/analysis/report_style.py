"""The style sheet of reports in HTML: one column, light and dark, for a phone, a screen and paper; it loads nothing."""

CSS = '''
:root { color-scheme: light dark; --ink: #1d2733; --soft: #52606d; --page: #fff; --card: #f4f6f8; --line: #d5dbe1;
  --accent: #1f6fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #a3b0bd; --page: #14181d; --card: #1f252c;
  --line: #3a444f; --accent: #7ab8ec; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
a { color: var(--accent); }
nav { margin: .75rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
ul.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
ul.findings li { background: var(--card); border-left: 4px solid var(--accent); border-radius: 4px;
  padding: .6rem .8rem; }
ul.findings p { margin: 0 0 .3rem; }
figure { margin: 1.5rem 0; }
.wide { overflow-x: auto; }
.picture { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
.picture img { display: block; max-width: max(100%, 34rem); height: auto; }
figcaption { margin-top: .4rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; caption-side: bottom; padding-top: .3rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; }
thead th { color: var(--soft); }
th.number, td.number { text-align: right; }
td.text { min-width: 18rem; white-space: normal; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
@media (prefers-color-scheme: dark) { .picture img { filter: brightness(.92); } .picture { background: #ebebeb; } }
@media print {
  :root { --ink: #000; --soft: #444; --page: #fff; --card: #fff; --line: #999; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, details { display: none; }
  .wide { overflow: visible; }
  .picture { border: 0; padding: 0; background: #fff; }
  .picture img { max-width: 100%; max-height: 22cm; filter: none; }
  figure, ul.findings li, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  table { font-size: 8pt; }
  th, td, td.text { min-width: 0; white-space: normal; }
}
'''
