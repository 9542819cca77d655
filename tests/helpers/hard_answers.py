"""Answers that look like a gold and are not, and spellings of a gold that look like another thing.

Each line of WRONG is `gold @ answer`: the answer must not be taken for the gold, nor the other way round. Each line of RIGHT holds
spellings of one thing. Both grow by kinds: a case that was found wrong brings its siblings along.
"""

# relations
RELATIONS = """
5 mg @ <5 mg
5 mg @ >5 mg
65 @ >65
65 @ \u226465
65 @ \u226565
<65 @ \u226465
>65 @ \u226565
<65 @ >65
-5 @ \u2260-5
5 @ \u22605
5 @ !=5
5 @ =/= 5
5 @ =\u03385
x=5 @ x\u22605
x=5 @ x!=5
10% @ <10%
10% @ >10%
p<0.05 @ p>0.05
p < 0.05 @ p > 0.05
p=0.05 @ p<0.05
p<0.05 @ p 0.05
a>b @ a<b
a>b @ a b
a>b @ a->b
a=b @ a\u2260b
a\u2208b @ a\u2209b
a\u2282b @ a\u2284b
5 @ ~5
5 @ \u22485
5 @ about 5
5 @ \u00b15
-5 @ +/-5
5 @ at least 5
5 @ at most 5
less than 5 @ more than 5
a implies b @ a=>b
a\u2192b @ a\u2190b
a\u2192b @ a\u2194b
5 @ \uff1c5
5 @ \ufe645
5 @ < 5
18 years @ under 18 years
18 years @ over 18 years
"""

# currencies and units
AMOUNTS = """
$5 @ 5
$5 @ \u00a35
$5 @ \u20ac5
$5 @ 5\u00a2
$5 @ US$5 000
$5 million @ $5
$5 million @ 5 million
5 dollars @ 5
5 dollars @ 5 pounds
\u00a35 @ 5 pounds
\u00a35 @ 5
5 euros @ 5
5% @ 5
5% @ 5\u2030
5\u2030 @ 5
5\u2031 @ 5
5% @ 5 percentage points
5\u00b0 @ 5
5\u02da @ 5
5\u00b0C @ 5\u00b0F
-5\u00b0C @ 5\u00b0C
5' @ 5
5" @ 5
5' @ 5"
6'2" @ 62
6'2 @ 6 2
5' @ 3'
5 mg @ 5 g
5 mg/dl @ 5 mg dl
5 N/m @ 5 N m
5/day @ 5 day
-$5 @ $5
- $5 @ $5
5 mg @ 5/mg
5 mg @ 5 mcg
10 kg @ 10 kg/m2
"""

# numbers, and signs between them
NUMBERS = """
5-10 @ 5 10
5-10 @ 510
5-10 @ 5, 10
5\u201310 @ 5 10
5 - 10 @ 5 10
5..10 @ 5 10
5-10 @ 5/10
5-10 @ 5:10
5 @ -5
5 @ \u22125
5 @ - 5
5 @ minus 5
5-10 @ -5-10
5-10 @ -10
0.5 @ 5
.5 @ 5
3.5 @ 35
1/2 @ 1 2
1/2 @ 12
\u00bd @ 12
1\u00bd @ 11/2
1\u00bd @ 1/2
3:1 @ 3 1
3:1 @ 31
3:1 @ 1:3
9:11 @ 9/11
2*3 @ 2 3
2\u00d73 @ 23
2\u00b73 @ 2 3
2+3 @ 2 3
2 + 3 @ 2 3
2 + 3 @ 2 - 3
2\u00f73 @ 2 3
10^5 @ 105
10\u2075 @ 105
10^5 @ 10 5
10^5 @ 10^-5
10\u207b\u2075 @ 10\u2075
10\u00b9\u2070 @ 10^1
1e5 @ 15
5! @ 5
n! @ n
|-5| @ -5
|x| @ x
1,000 @ 1
1,5 @ 1.5
1,000 @ 1,0,0,0
120/80 @ 120 80
2015-16 @ 2015 16
555-1234 @ 555 1234
1990s @ 1990
1st @ 1
two thirds @ 2
[0, 1] @ (0, 1)
[0, 1) @ [0, 1]
[0, 1] @ 0 1
\u230a2.5\u230b @ 2.5
\u230a2.5\u230b @ \u23082.5\u2309
\u20162\u2016 @ 2
\u00a75 @ 5
"""

# letters, charges, and names that differ by a sign
NAMES = """
O- @ O
O- @ O+
AB- @ AB
A+ @ A
HER2- @ HER2+
HER2- @ HER2
Cl- @ Cl
Ca2+ @ Ca2
CD4- @ CD4
C @ C++
C @ C#
B @ A, B
B @ A/B
B @ A-B
B @ A B
AB @ A/B
a/b @ a b
a|b @ a b
Sagittarius A* @ Sagittarius A
f'(x) @ f(x)
R&B @ RB
fib @ A-fib
hepatitis A @ hepatitis
hepatitis A @ hepatitis B
vitamin B1 @ vitamin B12
coop @ co-op
flu @ no flu
flu @ not flu
flu @ flu or gout
flu @ flu/gout
flu @ flu + gout
"""

# signs of every kind, money of other countries, units, arrows, pictures
FURTHER = """
5 mg @ \u22645 mg
5 mg @ up to 5 mg
5 mg @ > 5 mg
5 mg @ \u226e5 mg
5 mg @ 5 mg+
\u22655 @ \u22645
<5 @ \u22645
>5 @ >=5
5 @ \u20135
$5 @ \u00a55
$5 @ \u20b95
5 @ \u20b95
5 @ \u20a95
5 @ 5\u20bd
5 @ 5\u00a2
5 @ \u00a25
5 @ US$5
5 dollars @ 5 euros
5 USD @ 5 EUR
5 \u00b0C @ 5 \u00b0F
5 @ 5\u2032
x = 5 @ x != 5
x<y @ x>y
x\u2264y @ x<y
a\u2208B @ a\u2209B
A\u2282B @ A\u2283B
A\u222aB @ A\u2229B
A\u2227B @ A\u2228B
\u00acA @ A
!A @ A
\u2203x @ \u2200x
\u221a5 @ 5
\u221b5 @ \u221a5
\u221e @ 8
-\u221e @ \u221e
5\u00b2 @ 5
5\u00b2 @ 52
5\u2082 @ 5
H\u2082O @ H2O2
CO @ CO2
Na+ @ Na
Na+ @ Na-
Ca2+ @ Ca+
O2 @ O2-
O3 @ O2
A+ @ A-
AB+ @ AB-
Rh+ @ Rh-
HLA-B27 @ HLA-B7
p<0.05 @ p<0.5
p<.05 @ p>.05
1e5 @ 1e-5
1.5 @ 15
1,500 @ 1.500
1:2 @ 2:1
1:2 @ 12
1/2 @ 1-2
3.5-5.0 @ 3.55.0
3-5 @ 35
3\u20135 @ 3, 5
3 to 5 @ 35
5+10 @ 5-10
5\u00d710 @ 5+10
5\u00f710 @ 5\u00d710
5*10 @ 5+10
5 of 10 @ 5-10
No. 5 @ 5
5 a.m. @ 5 p.m.
5:00 @ 500
1990 @ '90
c. 1990 @ 1990
~1990 @ 1990
before 1990 @ 1990
after 1990 @ 1990
5 BC @ 5 AD
5 BC @ 5
5 mg @ 5 \u03bcg
5 mg/kg @ 5 mg
5 mg/kg @ 5 kg/mg
5 mmHg @ 5 mmol
C++ @ C#
F# @ F
A* @ A
A* @ A**
T4 @ T3
IL-2 @ IL-12
IL-1\u03b2 @ IL-1\u03b1
\u03b2-blocker @ \u03b1-blocker
\u03b2 @ \u00df
\u00b5 @ m
\u03a9 @ O
type 1 @ type 2
type I @ type II
stage IIa @ stage IIb
no @ yes
non-Hodgkin @ Hodgkin
hypo @ hyper
\u2190 @ \u2192
A\u2192B @ B\u2192A
A\u2191 @ A\u2193
\u2191K @ \u2193K
\u2191K @ K
K\u2191 @ K
\u21d1 @ \u21d3
\u2640 @ \u2642
\u266f @ \u266d
C\u266f @ C
B\u266d @ B
\u2713 @ \u2717
\u2611 @ \u2610
\U0001f44d @ \U0001f44e
\U0001f600 @ \U0001f622
A\u2261B @ A=B
A\u2245B @ A=B
A\u221dB @ A=B
x\u22a5y @ x\u2225y
x|y @ x||y
x&y @ x|y
A\u2216B @ A
1st @ 2nd
first @ one
Crohn's @ Crohn
O'Neil @ Neil
its @ it's a
caf\u00e9 @ cafe au
na\u00efve @ nave
5 in @ 5 ft
5\u2033 @ 5\u2032
5'10" @ 510
5'10" @ 5.10
{1} @ 1 2
(1,2) @ 12
[1,2] @ (1,2)
[1,2] @ 12
1..2 @ 12
\u2026 @ .
<5> @ <5
> @ <
= @ \u2260
$ @ \u20ac
+ @ -
% @ \u2030
? @ !
=5 @ \u22605
5\u2260 @ 5
\u22625 @ 5
\u22705 @ \u22645
\u22715 @ \u22655
\u226f5 @ >5
not 5 @ 5
\u226a5 @ 5
\u226b5 @ 5
\u22725 @ 5
\u223c5 @ 5
\u22435 @ 5
\u22505 @ 5
\u22135 @ \u00b15
\u22135 @ 5
\uff1e5 @ 5
\uff045 @ 5
\ufe695 @ 5
\uffe55 @ 5
\uffe15 @ 5
\u20ac5 @ 5
5\u20ac @ 5
5 \u20ac @ 5
EUR 5 @ 5
\u0e3f5 @ 5
\u20bf5 @ 5
\u20ba5 @ 5
\u20aa5 @ 5
\u20ab5 @ 5
\u20b15 @ 5
\u20b45 @ 5
\u00a45 @ 5
R$5 @ 5
\u2212$5 @ $5
$-5 @ $5
($5) @ -$5
5 or more @ 5
5 or more @ 5 or less
5 or more @ more than 5
5mg @ 5 g
5mg @ 5 mcg
5 or less @ less than 5
"""

# signs with a space, or brackets, around them
SPACED = """
50/ml @ 50 ml
50 / ml @ 50 ml
5 / day @ 5 day
5 mg / dL @ 5 mg dL
5 mg/day @ 5 mg day
m / s @ m s
x / y @ x y
x * y @ x y
x / y @ x * y
2 / x @ 2 x
P(A | B) @ P(A B)
x ^ 2 @ x 2
x ^ 2 @ x ^ -2
10 ^ 5 @ 10 5
65 + @ 65
Na + @ Na
O - @ O
O - @ O +
HLA-B27 + @ HLA-B27
HER2 - @ HER2 +
HBsAg (-) @ HBsAg (+)
HBsAg (-) @ HBsAg
HBsAg (\u2212) @ HBsAg (+)
Rh(D)- @ Rh(D)+
Rh(D)- @ Rh(D)
(+)-catechin @ (-)-catechin
ER(+)/PR(-) @ ER(-)/PR(+)
D(-)-lactate @ D(+)-lactate
-x @ x
\u2212x @ x
-x+1 @ x+1
-(x+1) @ x+1
-\\frac{1}{2} @ \\frac{1}{2}
$-\\sqrt{2}$ @ \\sqrt{2}
-\\infty @ \\infty
- \\pi @ \\pi
"""


def pairs(*texts: str) -> list[tuple[str, str]]:
    found = []
    for text in texts:
        for line in text.strip().splitlines():
            gold, answer = line.split(" @ ")
            found.append((gold, answer))
    return found


WRONG = pairs(RELATIONS, AMOUNTS, NUMBERS, NAMES, FURTHER, SPACED)

RIGHT = [
    line.split(" @ ")
    for line in """
e-mail @ email @ e mail @ E-Mail
co-trimoxazole @ cotrimoxazole @ co trimoxazole
non-small cell lung cancer @ nonsmall cell lung cancer @ non small cell lung cancer
anti-inflammatory @ antiinflammatory
pre-eclampsia @ preeclampsia
5 percent @ 5% @ 5 % @ five percent @ 5 per cent @ 5\\%
1st @ first @ First
21st century @ twenty-first century
3rd degree burn @ third-degree burn
Crohn's disease @ Crohn disease @ Crohns disease @ Crohn\u2019s Disease
Bell's palsy @ Bell palsy @ Bells palsy
Down's syndrome @ Down syndrome
Cushing's syndrome @ cushing syndrome
<5 mg @ < 5 mg @ less than 5 mg @ \uff1c5 mg
\u226565 @ >= 65 @ at least 65 @ \u2a7e 65 @ 65 or more
\u226465 @ <=65 @ at most 65 @ 65 or less
\u22605 @ != 5 @ =\u03385 @ not equal to 5
p<0.05 @ p < .05 @ p less than 0.05 @ P<0.05
x = 5 @ x=5 @ x == 5
~5 @ \u22485 @ about 5 @ approximately 5
\u00b15 @ +/-5 @ +- 5
a -> b @ a\u2192b @ a --> b
5 mg/dL @ 5 mg / dL @ 5 mg/ dL @ 5mg /dl
5 mg/kg/day @ 5 mg / kg / day
3/hour @ 3 / hour @ 3/ hour
911/Mr. Lonely @ 911/ Mr. Lonely @ 911 / Mr. Lonely
x/y @ x / y
P(A|B) @ P(A | B)
AC/DC @ AC / DC
x^2 @ x ^ 2 @ x\u00b2
10^-5 @ 10 ^ -5
Na+ @ Na +
O- @ O -
65+ @ 65 +
HBsAg (+) @ HBsAg positive @ HBsAg(+)
- flu @ flu
- A @ A
-{5} @ -5 @ -(5) @ minus 5
HBsAg (-) @ HBsAg negative @ HBsAg (\u2212)
$5 @ $ 5 @ 5$ @ 5 dollars @ $5.00
$5 million @ 5 million dollars @ $5 Million
$200,000 @ 200000 dollars
\u20ac5 @ 5 \u20ac @ 5 euros
5-10 @ 5\u201310 @ 5 - 10 @ 5 \u2014 10 @ 5..10
-5 @ \u22125 @ - 5 @ minus 5 @ negative 5
1/2 @ \u00bd @ 1 / 2
1\u00bd @ 1 1/2
3:1 @ 3 : 1 @ 3/1
2\u00d73 @ 2 x 3 @ 2x3
10\u2075 @ 10^5 @ 10**5
10\u207b\u2075 @ 10^-5 @ 10^\u22125
37\u00b0C @ 37 \u00b0C @ 37\u00b0 c
"flu" @ 'flu' @ \u201cflu\u201d @ **flu** @ *flu* @ flu. @ <flu> @ flu! @ -flu-
"5" @ '5' @ $5$ @ **5** @ 5.
A & B @ A and B
rock 'n' roll @ rock n roll
1999-05-03 @ 3 May 1999 @ May 3rd, 1999 @ 1999/05/03
HIV/AIDS @ HIV AIDS
1,000 @ 1000
5 mg @ 5mg
20 mg/dl @ 20mg/dl
-\u221e @ - \u221e @ \u2212\u221e
the flu @ flu @ a flu
""".strip().splitlines()
]
