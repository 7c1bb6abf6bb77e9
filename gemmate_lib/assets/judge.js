"use strict";
const find = (id) => document.getElementById(id);
const [columns, ...rows] = JSON.parse(find("rows").textContent);
const choice = ([pair]) => document.querySelector(`[name=pair-${pair}]:checked`)?.value ?? "";
const line = (cells) => cells.map((x) => `"${x.replaceAll('"', '""')}"`).join(",") + "\r\n";
let saved = true;
function count() {
  const done = rows.filter(choice).length;
  find("bar").value = done;
  find("count").textContent = `${done} of ${rows.length} answered`;
}
function save() {
  const text = "\ufeff" + [columns, ...rows.map((row) => [...row, choice(row)])].map(line).join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "answers.csv";
  link.click();
  saved = true;
}
document.addEventListener("change", () => { saved = false; count(); });
find("save").addEventListener("click", save);
addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
addEventListener("pageshow", count);
