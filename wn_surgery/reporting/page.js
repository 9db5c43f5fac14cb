"use strict";
// Sorting and searching. Without it the page shows the same, in the order of the model.
document.documentElement.classList.add("js");
function search(section, filter) {
  const tools = section.querySelector(".tools");
  const [field, output] = [tools.querySelector("input"), tools.querySelector("output")];
  tools.hidden = false;
  const run = () => { output.textContent = filter(field.value.trim().toLowerCase()); };
  let waiting;
  field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(run, 120); });
  field.addEventListener("change", run);
  run();
  return run;
}

const table = document.querySelector("table");
if (table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const layouts = new Set();
  let texts;
  const run = search(document.getElementById("weights"), (wanted) => {
    if (wanted) texts ??= rows.map((row) =>
      [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
    let count = 0;
    rows.forEach((row, index) => {
      const found = (!layouts.size || layouts.has(row.dataset.layout))
        && (!wanted || texts[index].includes(wanted));
      row.hidden = !found;
      count += found;
    });
    return count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
  });

  for (const button of document.querySelectorAll(".legend button")) {
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const { layout } = button.dataset;
      if (!layouts.delete(layout)) layouts.add(layout);
      button.setAttribute("aria-pressed", layouts.has(layout));
      run();
    });
  }

  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const numeric = rows.some((row) => "v" in row.cells[column].dataset);
    button.addEventListener("click", () => {
      // Up, down, and back to the order of the model.
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const order = next[head.ariaSort ?? "none"];
      for (const each of heads) each.removeAttribute("aria-sort");
      let sorted = rows;
      if (order !== "none") {
        head.ariaSort = order;
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => {
          const cell = row.cells[column];
          if (!numeric) return cell.textContent;
          return "v" in cell.dataset ? Number(cell.dataset.v) : NaN;
        };
        const keyed = rows.map((row) => [value(row), row]);
        keyed.sort(([one], [other]) => {
          if (!numeric) return sign * compare(one, other);
          // What has no value comes last, both ways.
          return Number.isNaN(one) - Number.isNaN(other) || sign * (one - other) || 0;
        });
        sorted = keyed.map(([, row]) => row);
      }
      body.append(...sorted);
    });
  });
}

const tree = document.querySelector(".tree");
if (tree) {
  const opened = new Set(tree.querySelectorAll("details[open]"));
  const top = tree.firstElementChild;
  // The names of a branch; one that stands for several has those that the search names.
  const matches = (item, prefixes, wanted, above) => {
    const code = item.querySelector(":scope > div > code, :scope > details > summary > code");
    const all = code.dataset.all?.split(" ") ?? [code.textContent];
    const said = all.filter((name) => wanted.includes(name.toLowerCase()));
    const labels = all.length > 1 ? [all[0], ...said.slice(0, 8)] : all;
    const names = prefixes.flatMap((prefix) => labels.map((label) => prefix + label)).slice(0, 64);
    const line = code.parentElement.textContent.toLowerCase();
    const own = names.some((name) => `${name.toLowerCase()} ${line}`.includes(wanted));
    let below = 0;
    const details = code.closest("details");
    if (details && details.parentElement === item) {
      const next = item === top ? [""] : names.map((name) => `${name}.`);
      for (const child of details.lastElementChild.children) {
        below += matches(child, next, wanted, above || own);
      }
      details.open = wanted ? below > 0 : opened.has(details);
    }
    item.hidden = Boolean(wanted) && item !== top && !own && !below && !above;
    return below + (own && item !== top);
  };
  search(document.getElementById("tree"), (wanted) => {
    if (!wanted && !tree.querySelector("li[hidden]")) return "";
    const count = matches(top, [""], wanted, false);
    return wanted ? `${count} found` : "";
  });
}
