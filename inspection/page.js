"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text");
const panel = document.getElementById("token");
const choice = (id) => Number(document.getElementById(id).value);
let chosen = -1;

// Everything that comes from the text is written as text, never as markup.
function element(parent, name, content, className) {
  const made = document.createElement(name);
  if (content !== undefined) made.textContent = content;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function fill(id, names) {
  names.forEach((name, value) => { element(document.getElementById(id), "option", name).value = value; });
}

function value(token) {
  const [layer, stream] = [choice("layer"), choice("stream")];
  const kind = document.getElementById("colour").value;
  if (kind !== "share") return data[kind][layer][token][stream];
  return data.added[layer][token][stream] / (data.stream[layer][token][stream] || 1);
}

function paint() {
  const values = data.tokens.map((_, token) => value(token));
  const high = document.getElementById("colour").value === "gates" ? 1 : Math.max(...values, 1e-9);
  document.getElementById("low").textContent = "0";
  document.getElementById("high").textContent = high.toPrecision(3);
  [...text.children].forEach((span, token) => {
    span.style.backgroundColor = `rgba(24, 119, 242, ${0.75 * Math.min(1, values[token] / high)})`;
  });
}

function row(table, cells, classes = []) {
  const made = element(table, "tr");
  cells.forEach((cell, place) => element(made, "td", cell, classes[place]));
}

function show(token) {
  if (token < 0 || token >= data.tokens.length) return;
  if (chosen >= 0) text.children[chosen].classList.remove("chosen");
  chosen = token;
  text.children[token].classList.add("chosen");
  panel.replaceChildren();
  element(panel, "h2", `${token}: ${JSON.stringify(data.tokens[token])} (id ${data.ids[token]})`);
  for (const [pack, words] of data.records[token]) element(panel, "p", `record of ${pack}: ${words}`);
  const gates = element(panel, "table");
  row(gates, ["layer", "stream", "gate", "added", "stream's norm"]);
  data.layer_ids.forEach((layer, l) => data.gates[l][token].forEach((gate, s) => row(gates,
    [layer, s, gate.toFixed(3), data.added[l][token][s].toFixed(3), data.stream[l][token][s].toFixed(1)],
    ["number", "number", "number", "number", "number"])));
  const layer = choice("layer");
  data.rows[layer][token].forEach((heads, o) => {
    const ngram = data.tokens.slice(Math.max(0, token - o - 1), token + 1).join("");
    const norm = data.by_order[layer][token][choice("stream")][o];
    element(panel, "h3", `${o + 2}-gram ${JSON.stringify(ngram)}, value ${norm.toFixed(3)}`);
    const table = element(panel, "table");
    row(table, ["head", "row", "in the corpus"]);
    heads.forEach((number, head) => {
      const others = data.sharers[`${data.layer_ids[layer]} ${o + 2} ${number}`] || [];
      const filled = data.filled[layer][token][o][head] === "1";
      row(table, [head, filled ? number : `${number} (zeros)`,
        data.has_corpus ? others.map((place) => data.ngrams[place]).join(" · ") : "no corpus given"],
        ["number", filled ? "number" : "number empty"]);
    });
  });
}

fill("layer", data.layer_ids);
fill("stream", data.gates[0][0].map((_, stream) => stream));
data.tokens.forEach((piece, token) => {
  const span = element(text, "span", piece, data.records[token].length ? "record" : "");
  span.addEventListener("mouseenter", () => show(token));
  span.addEventListener("click", () => show(token));
});
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT") return;
  if (event.key === "ArrowRight") show(chosen + 1);
  if (event.key === "ArrowLeft") show(chosen - 1);
});
for (const id of ["layer", "stream", "colour"]) {
  document.getElementById(id).addEventListener("change", () => { paint(); show(chosen); });
}
paint();
show(location.hash ? Number(location.hash.slice(1)) : -1);  // a link may name a token: reads.html#12
