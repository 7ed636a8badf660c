// Sliders, copy buttons, and the mark at the station that is being read. The page reads well without any of it.
for (const input of document.querySelectorAll(".slider input")) {
  const move = () => {
    input.parentElement.style.setProperty("--split", input.value + "%");
    const share = Math.round(input.value);
    input.setAttribute("aria-valuetext", `${share} % ${input.dataset.left}, ${100 - share} % ${input.dataset.right}`);
  };
  input.addEventListener("input", move);
  move();
}

for (const button of document.querySelectorAll(".command button")) {
  if (!navigator.clipboard) continue; // a page on plain http, where the clipboard is out of reach
  button.hidden = false;
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Press Ctrl+C";
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "location");
    }
  },
  { rootMargin: "-20% 0px -70% 0px" },
);
for (const section of document.querySelectorAll("main > section")) watcher.observe(section);
